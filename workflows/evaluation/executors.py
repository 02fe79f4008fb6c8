"""Executors of a sweep: this process, or Ray actors that each hold one network."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any, Protocol

import torch

from preprocessing.io.ray_resources import max_resources, report_while_waiting, resources_available
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.sampling import MAX_BATCH_SIZE
from workflows.evaluation.worker import EvaluationWorker, SampleTask, TaskResult

CompletedTask = tuple[SampleTask, TaskResult]


class SweepExecutor(Protocol):
    """Extracts the features of real clips, then runs the tasks of a sweep."""

    def extract_real_features(self) -> ReferenceFeatures:
        """Return the features of the real clips."""
        ...

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        """Yield tasks with their results in order of completion."""
        ...


@contextmanager
def open_executor(worker: EvaluationWorker, workers: int) -> Iterator[SweepExecutor]:
    """Yield a LocalExecutor for one worker, else a RayExecutor on a running or new Ray cluster."""
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
    """Return the indices of the real clips in batches of ``MAX_BATCH_SIZE``."""
    clips = len(worker.evaluation_set.real_clips)
    return [range(at, min(at + MAX_BATCH_SIZE, clips)) for at in range(0, clips, MAX_BATCH_SIZE)]


class LocalExecutor:
    """Runs tasks in this process, sorted by checkpoint."""

    def __init__(self, worker: EvaluationWorker) -> None:
        self._worker = worker

    def extract_real_features(self) -> ReferenceFeatures:
        """Return the features of the real clips."""
        worker = self._worker
        return _reference_features(
            worker, list(chain.from_iterable(map(worker.extract_real_features, _real_batches(worker))))
        )

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        """Yield tasks with their results, sorted by checkpoint."""
        for _, group in groupby(tasks, key=lambda task: task.point.checkpoint.path):
            yield from _run_checkpoint(self._worker, list(group))


def _run_checkpoint(worker: EvaluationWorker, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
    """Sample in this thread while a second thread extracts the features of the previous batch."""
    # Speed is measured before the second thread starts.
    setting_metrics = {id(task): worker.measure_once(task.point) for task in tasks if task.is_first}
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
    """Use one thread less for torch, so that the feature thread has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RayExecutor:
    """Runs tasks on Ray actors; a free actor gets the next task, longest samples first."""

    def __init__(self, worker: EvaluationWorker, workers: int) -> None:
        import ray

        from workflows.utils.ray_runtime import worker_runtime_env

        resources = max_resources(ray.cluster_resources())
        gpus = min(1.0, resources.get("GPU", 0.0) / workers)
        cpus = min(1.0, resources.get("CPU", 0.0) / workers)
        cpus = cpus or 1.0  # an actor without CPUs would be placed on a head node without CPUs
        evaluation_set_ref = ray.put(worker.evaluation_set)
        actor: Any = ray.remote(EvaluationWorker)
        create = actor.options(num_cpus=cpus, num_gpus=gpus, runtime_env=worker_runtime_env())
        self._worker = worker
        self._actors = [create.remote(evaluation_set_ref, worker.feature_models) for _ in range(workers)]
        threads = max(1, (os.cpu_count() or 1) // workers)
        required = {"CPU": cpus, "GPU": gpus}
        available = resources_available(required, ray.cluster_resources)
        with report_while_waiting(f"machines for {workers} workers", ray.cluster_resources, seen=available):
            ray.get([worker.set_num_threads.remote(threads) for worker in self._actors])

    def extract_real_features(self) -> ReferenceFeatures:
        """Return the features of the real clips."""
        features: dict[range, list[ClipFeatures]] = dict(
            self._run_on_actors(
                _real_batches(self._worker), lambda worker, indices: worker.extract_real_features.remote(indices)
            )
        )
        in_order = [features[indices] for indices in _real_batches(self._worker)]
        return _reference_features(self._worker, list(chain.from_iterable(in_order)))

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        """Yield tasks with their results in order of completion."""
        # long tasks first: one that starts last would delay the end
        order = sorted(tasks, key=lambda t: (t.point.checkpoint.path, -t.point.params.num_function_evaluations))
        yield from self._run_on_actors(order, lambda worker, task: worker.run_task.remote(task))

    def _run_on_actors(self, items: Sequence[Any], submit: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        import ray

        pending = deque(items)
        running: dict[Any, tuple[Any, Any]] = {}  # reference of the result -> actor and item

        def start(worker: Any) -> None:
            if pending:
                item = pending.popleft()
                running[submit(worker, item)] = worker, item

        for worker in self._actors:
            start(worker)
        while running:
            (ready,), _ = ray.wait(list(running))
            worker, item = running.pop(ready)
            start(worker)  # before the caller processes the result
            yield item, ray.get(ready)
