"""Who does the work of a sweep: this process, or workers of Ray's that each hold a network."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch

from preprocessing.io.ray_resources import max_resources, report_while_waiting, resources_available
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.sampling import MAX_BATCH_SIZE
from workflows.evaluation.worker import EvaluationWorker, SampleTask, TaskResult

CompletedTask = tuple[SampleTask, TaskResult]


class SweepExecutor(Protocol):
    """Reads the real clips, then makes and reads samples."""

    def extract_real_features(self) -> ReferenceFeatures:
        """What the real clips show to the readers of samples."""
        ...

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        """Outcomes, as they are finished."""
        ...


@contextmanager
def open_executor(worker: EvaluationWorker, workers: int) -> Iterator[SweepExecutor]:
    """One worker is this process. More are Ray's: in the Ray that is running, else in one started for it."""
    if workers == 1:
        yield LocalExecutor(worker)
        return
    from workflows.utils.ray_runtime import ray_session

    with ray_session(workers):
        yield RayExecutor(worker, workers)


def _reference_features(worker: EvaluationWorker, features: Sequence[ClipFeatures]) -> ReferenceFeatures:
    prompts = len(worker.evaluation_set.prompts)
    return ReferenceFeatures(prompts=features[:prompts], reference=features[prompts:])


def _real_batches(worker: EvaluationWorker) -> list[range]:
    """Places of the real clips, as many at once as of samples."""
    clips = len(worker.evaluation_set.real_clips)
    return [range(at, min(at + MAX_BATCH_SIZE, clips)) for at in range(0, clips, MAX_BATCH_SIZE)]


class LocalExecutor:
    """Checkpoint after checkpoint, batch after batch, in this process."""

    def __init__(self, worker: EvaluationWorker) -> None:
        self._worker = worker

    def extract_real_features(self) -> ReferenceFeatures:
        worker = self._worker
        return _reference_features(
            worker, [r for indices in _real_batches(worker) for r in worker.extract_real_features(indices)]
        )

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        for _, group in groupby(tasks, key=lambda task: task.point.checkpoint.path):
            yield from _run_checkpoint(self._worker, list(group))


def _run_checkpoint(worker: EvaluationWorker, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
    """One thread samples, another reads the batch before."""
    setting_metrics = {
        id(task): worker.measure_once(task.point) for task in tasks if task.is_first
    }  # while nothing else runs
    with ThreadPoolExecutor(1) as pool, reserve_reader_thread():
        previous: tuple[SampleTask, Future[TaskResult]] | None = None
        for task in tasks:
            batch = worker.sample_batch(task)
            if previous is not None:
                yield previous[0], previous[1].result()
            previous = task, pool.submit(worker.extract_features, task, batch, setting_metrics.get(id(task), {}))
        if previous is not None:
            yield previous[0], previous[1].result()


@contextmanager
def reserve_reader_thread() -> Iterator[None]:
    """Leave a core to the thread that reads: small networks gain nothing from sharing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RayExecutor:
    """Each free worker takes the next piece of work; the longest samples come first."""

    def __init__(self, worker: EvaluationWorker, workers: int) -> None:
        import ray

        from workflows.utils.ray_runtime import worker_runtime_env

        resources = max_resources(ray.cluster_resources())
        cpus, gpus = (min(1.0, resources.get(kind, 0.0) / workers) for kind in ("CPU", "GPU"))
        cpus = cpus or 1.0  # a head alone, of no CPUs: a worker that asked for none would run there
        evaluation_set_ref = ray.put(worker.evaluation_set)
        actor: Any = ray.remote(EvaluationWorker)
        create = actor.options(num_cpus=cpus, num_gpus=gpus, runtime_env=worker_runtime_env())
        self._worker = worker
        self._actors = [create.remote(evaluation_set_ref, worker.feature_models) for _ in range(workers)]
        threads = max(1, (os.cpu_count() or 1) // workers)
        required, there = {"CPU": cpus, "GPU": gpus}, ray.cluster_resources
        with report_while_waiting(f"machines for {workers} workers", there, seen=resources_available(required, there)):
            ray.get([worker.set_num_threads.remote(threads) for worker in self._actors])

    def extract_real_features(self) -> ReferenceFeatures:
        features: dict[range, list[ClipFeatures]] = dict(
            self._run_on_actors(
                _real_batches(self._worker), lambda worker, indices: worker.extract_real_features.remote(indices)
            )
        )
        return _reference_features(
            self._worker, [r for indices in sorted(features, key=lambda p: p.start) for r in features[indices]]
        )

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        # a long task begun last would keep the other workers waiting
        order = sorted(tasks, key=lambda t: (t.point.checkpoint.path, -t.point.params.num_function_evaluations))
        yield from self._run_on_actors(order, lambda worker, task: worker.run_task.remote(task))

    def _run_on_actors(self, items: Sequence[Any], submit: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        import ray

        pending, running = deque(items), dict[Any, tuple[Any, Any]]()

        def start(worker: Any) -> None:
            if pending:
                item = pending.popleft()
                running[submit(worker, item)] = worker, item

        for worker in self._actors:
            start(worker)
        while running:
            (ready,), _ = ray.wait(list(running))
            worker, item = running.pop(ready)
            start(worker)  # before the result is used: nobody waits for that
            yield item, ray.get(ready)
