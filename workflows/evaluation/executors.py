"""Who does the work of a sweep: this process, or workers of Ray's that each hold a network."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch

from preprocessing.io.ray_resources import has_come, most, told_while_waiting
from workflows.evaluation.clip_features import Reading
from workflows.evaluation.metrics.generic import Real
from workflows.evaluation.sampling import ROWS
from workflows.evaluation.worker import Examiner, Outcome, Task

Done = tuple[Task, Outcome]


class Crew(Protocol):
    """Reads the real clips, then makes and reads samples."""

    def read_real(self) -> Real:
        """What the real clips show to the readers of samples."""
        ...

    def work(self, tasks: Sequence[Task]) -> Iterator[Done]:
        """Outcomes, as they are finished."""
        ...


@contextmanager
def crew(examiner: Examiner, workers: int) -> Iterator[Crew]:
    """One worker is this process. More are Ray's: in the Ray that is running, else in one started for it."""
    if workers == 1:
        yield InLine(examiner)
        return
    from workflows.utils.ray_runtime import ray_running

    with ray_running(workers):
        yield OnRay(examiner, workers)


def _real(examiner: Examiner, readings: Sequence[Reading]) -> Real:
    prompts = len(examiner.held.prompts)
    return Real(prompts=readings[:prompts], reference=readings[prompts:])


def _real_batches(examiner: Examiner) -> list[range]:
    """Places of the real clips, as many at once as of samples."""
    clips = len(examiner.held.real)
    return [range(at, min(at + ROWS, clips)) for at in range(0, clips, ROWS)]


class InLine:
    """Checkpoint after checkpoint, batch after batch, in this process."""

    def __init__(self, examiner: Examiner) -> None:
        self._examiner = examiner

    def read_real(self) -> Real:
        examiner = self._examiner
        return _real(examiner, [r for places in _real_batches(examiner) for r in examiner.read_real(places)])

    def work(self, tasks: Sequence[Task]) -> Iterator[Done]:
        for _, group in groupby(tasks, key=lambda task: task.setting.subject.path):
            yield from _of_one(self._examiner, list(group))


def _of_one(examiner: Examiner, tasks: Sequence[Task]) -> Iterator[Done]:
    """One thread samples, another reads the batch before."""
    onces = {id(task): examiner.once(task.setting) for task in tasks if task.first}  # while nothing else runs
    with ThreadPoolExecutor(1) as pool, one_thread_less():
        before: tuple[Task, Future[Outcome]] | None = None
        for task in tasks:
            batch = examiner.sample(task)
            if before is not None:
                yield before[0], before[1].result()
            before = task, pool.submit(examiner.read, task, batch, onces.get(id(task), {}))
        if before is not None:
            yield before[0], before[1].result()


@contextmanager
def one_thread_less() -> Iterator[None]:
    """Leave a core to the thread that reads: small networks gain nothing from sharing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class OnRay:
    """Each free worker takes the next piece of work; the longest samples come first."""

    def __init__(self, examiner: Examiner, workers: int) -> None:
        import ray

        from workflows.utils.ray_runtime import worker_environment

        room = most(ray.cluster_resources())
        share, gpus = (min(1.0, room.get(kind, 0.0) / workers) for kind in ("CPU", "GPU"))
        share = share or 1.0  # a head alone, of no CPUs: a worker that asked for none would run there
        shared = ray.put(examiner.held)
        actor: Any = ray.remote(Examiner)
        make = actor.options(num_cpus=share, num_gpus=gpus, runtime_env=worker_environment())
        self._examiner = examiner
        self._staff = [make.remote(shared, examiner.instruments) for _ in range(workers)]
        threads = max(1, (os.cpu_count() or 1) // workers)
        asked, there = {"CPU": share, "GPU": gpus}, ray.cluster_resources
        with told_while_waiting(f"machines for {workers} workers", there, seen=has_come(asked, there)):
            ray.get([worker.use_threads.remote(threads) for worker in self._staff])

    def read_real(self) -> Real:
        read: dict[range, list[Reading]] = dict(
            self._share(_real_batches(self._examiner), lambda worker, places: worker.read_real.remote(places))
        )
        return _real(self._examiner, [r for places in sorted(read, key=lambda p: p.start) for r in read[places]])

    def work(self, tasks: Sequence[Task]) -> Iterator[Done]:
        # a long task begun last would keep the other workers waiting
        order = sorted(tasks, key=lambda t: (t.setting.subject.path, -t.setting.how.nfe))
        yield from self._share(order, lambda worker, task: worker.work.remote(task))

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
