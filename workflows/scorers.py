"""Who does the tasks of a sweep: this process, or workers of Ray's that each hold a network."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch

from workflows.examiner import Examiner, Outcome, Task
from workflows.heldout import HeldOut
from workflows.instruments import Instruments

Done = tuple[Task, Outcome]


def in_line(examiner: Examiner, tasks: Sequence[Task]) -> Iterator[Done]:
    """Checkpoint after checkpoint, batch after batch."""
    for _, group in groupby(tasks, key=lambda task: task.setting.subject.path):
        yield from _of_one(examiner, list(group))


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


def on_ray(held: HeldOut, instruments: Instruments, tasks: Sequence[Task], workers: int) -> Iterator[Done]:
    """Each free worker takes the next task; the longest come first. Results come as they are finished.

    In the Ray that is running, else in one started for it in this process.
    """
    from workflows.training.launch import ray_running, worker_environment

    with ray_running(workers):
        import ray

        here = ray.cluster_resources()
        share, gpus = (min(1.0, here.get(kind, 0.0) / workers) for kind in ("CPU", "GPU"))
        shared = ray.put(held)
        actor: Any = ray.remote(Examiner)
        make = actor.options(num_cpus=share, num_gpus=gpus, runtime_env=worker_environment())
        staff = [make.remote(shared, instruments) for _ in range(min(workers, len(tasks)))]
        threads = max(1, (os.cpu_count() or 1) // workers)
        ray.get([worker.use_threads.remote(threads) for worker in staff])
        waiting, running = deque(tasks), dict[Any, tuple[Any, Task]]()

        def start(worker: Any) -> None:
            if waiting:
                task = waiting.popleft()
                running[worker.work.remote(task)] = worker, task

        for worker in staff:
            start(worker)
        while running:
            (ready,), _ = ray.wait(list(running))
            worker, task = running.pop(ready)
            start(worker)  # before the outcome is scored: nobody waits for that
            yield task, ray.get(ready)
