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
def open_executor(examiner: EvaluationWorker, workers: int) -> Iterator[SweepExecutor]:
    """One worker is this process. More are Ray's: in the Ray that is running, else in one started for it."""
    if workers == 1:
        yield LocalExecutor(examiner)
        return
    from workflows.utils.ray_runtime import ray_session

    with ray_session(workers):
        yield RayExecutor(examiner, workers)


def _real(examiner: EvaluationWorker, readings: Sequence[ClipFeatures]) -> ReferenceFeatures:
    prompts = len(examiner.held.prompts)
    return ReferenceFeatures(prompts=readings[:prompts], reference=readings[prompts:])


def _real_batches(examiner: EvaluationWorker) -> list[range]:
    """Places of the real clips, as many at once as of samples."""
    clips = len(examiner.held.real_clips)
    return [range(at, min(at + MAX_BATCH_SIZE, clips)) for at in range(0, clips, MAX_BATCH_SIZE)]


class LocalExecutor:
    """Checkpoint after checkpoint, batch after batch, in this process."""

    def __init__(self, examiner: EvaluationWorker) -> None:
        self._examiner = examiner

    def extract_real_features(self) -> ReferenceFeatures:
        examiner = self._examiner
        return _real(
            examiner, [r for places in _real_batches(examiner) for r in examiner.extract_real_features(places)]
        )

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        for _, group in groupby(tasks, key=lambda task: task.setting.subject.path):
            yield from _of_one(self._examiner, list(group))


def _of_one(examiner: EvaluationWorker, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
    """One thread samples, another reads the batch before."""
    onces = {
        id(task): examiner.measure_once(task.setting) for task in tasks if task.is_first
    }  # while nothing else runs
    with ThreadPoolExecutor(1) as pool, reserve_reader_thread():
        before: tuple[SampleTask, Future[TaskResult]] | None = None
        for task in tasks:
            batch = examiner.sample_batch(task)
            if before is not None:
                yield before[0], before[1].result()
            before = task, pool.submit(examiner.extract_features, task, batch, onces.get(id(task), {}))
        if before is not None:
            yield before[0], before[1].result()


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

    def __init__(self, examiner: EvaluationWorker, workers: int) -> None:
        import ray

        from workflows.utils.ray_runtime import worker_runtime_env

        room = max_resources(ray.cluster_resources())
        share, gpus = (min(1.0, room.get(kind, 0.0) / workers) for kind in ("CPU", "GPU"))
        share = share or 1.0  # a head alone, of no CPUs: a worker that asked for none would run there
        shared = ray.put(examiner.held)
        actor: Any = ray.remote(EvaluationWorker)
        make = actor.options(num_cpus=share, num_gpus=gpus, runtime_env=worker_runtime_env())
        self._examiner = examiner
        self._staff = [make.remote(shared, examiner.instruments) for _ in range(workers)]
        threads = max(1, (os.cpu_count() or 1) // workers)
        asked, there = {"CPU": share, "GPU": gpus}, ray.cluster_resources
        with report_while_waiting(f"machines for {workers} workers", there, seen=resources_available(asked, there)):
            ray.get([worker.set_num_threads.remote(threads) for worker in self._staff])

    def extract_real_features(self) -> ReferenceFeatures:
        read: dict[range, list[ClipFeatures]] = dict(
            self._share(
                _real_batches(self._examiner), lambda worker, places: worker.extract_real_features.remote(places)
            )
        )
        return _real(self._examiner, [r for places in sorted(read, key=lambda p: p.start) for r in read[places]])

    def map(self, tasks: Sequence[SampleTask]) -> Iterator[CompletedTask]:
        # a long task begun last would keep the other workers waiting
        order = sorted(tasks, key=lambda t: (t.setting.subject.path, -t.setting.how.num_function_evaluations))
        yield from self._share(order, lambda worker, task: worker.run_task.remote(task))

    def _share(self, pieces: Sequence[Any], give: Callable[[Any, Any], Any]) -> Iterator[tuple[Any, Any]]:
        import ray

        waiting, running = deque(pieces), dict[Any, tuple[Any, Any]]()

        def start(worker: Any) -> None:
            if waiting:
                piece = waiting.popleft()
                running[give(worker, piece)] = worker, piece

        for worker in self._staff:
            start(worker)
        while running:
            (ready,), _ = ray.wait(list(running))
            worker, piece = running.pop(ready)
            start(worker)  # before the result is used: nobody waits for that
            yield piece, ray.get(ready)
