import os
import threading
from collections import defaultdict
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

INTERVAL_S = 0.5  # seconds between two looks
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the kernel's accounts
WARM_UP = 0.2  # share of the looks that is left out


class ProcessTreeCpuClock:
    """CPU seconds of this process and of all below it, those that have ended included.

    A process that ends is added to its parent's account, if the parent asks for it. Ray's does not: what such a process
    had when it was last seen is kept here. Accounts are kept in the kernel's whole ticks: a sum of seconds depends on
    its order, and could run backwards when a process moves from one account to another.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], tuple[int, int, int]] = {}  # own, of ended children, parent
        self._lost: dict[int, int] = defaultdict(int)  # by parent, of ended ones that are in no account yet

    def read(self) -> float:
        """Look now: what a process used between the last look and its end may be missed."""
        now: dict[tuple[int, float], tuple[int, int, int]] = {}
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                with process.oneshot():
                    t: Any = process.cpu_times()
                    key = (process.pid, process.create_time())
                    own, below = t.user + t.system, t.children_user + t.children_system
                    now[key] = (round(own * TICKS), round(below * TICKS), process.ppid())
            except psutil.Error:
                continue
        ended: dict[int, int] = defaultdict(int)  # by parent
        for key, (own, below, parent) in self._seen.items():
            ended[parent] += 0 if key in now else own + below
        for key, (_, below, _) in now.items():
            ended[key[0]] -= below - self._seen.get(key, (0, 0, 0))[1]
        for parent, ticks in ended.items():
            self._lost[parent] = max(0, self._lost[parent] + ticks)
        self._seen = now
        return (sum(self._lost.values()) + sum(own + below for own, below, _ in now.values())) / TICKS


class ProcessTreeMonitor:
    """Looks at the memory and the CPU of this process and of all below it while a ``with`` block runs."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # used inside the block, known behind it
        self._clock = ProcessTreeCpuClock()
        self.rss: list[int] = []  # bytes, shared pages (the object store) left out
        self.store: list[int] = []  # bytes of shared pages of the process that has most: the object store's
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._began = self._clock.read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.cpu_s = self._clock.read() - self._began

    def _look(self) -> None:
        me = psutil.Process()
        while True:
            own, shared = 0, 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory: Any = process.memory_info()
                except psutil.Error:
                    continue
                own += memory.rss - memory.shared
                shared = max(shared, memory.shared)
            self._clock.read()
            self.rss.append(own)
            self.store.append(shared)
            if self._stop.wait(INTERVAL_S):
                return

    def peak_level(self) -> tuple[int, int]:
        """95th percentile of own and of shared memory after the warm-up, bytes."""
        first = int(len(self.rss) * WARM_UP)
        return int(np.percentile(self.rss[first:], 95)), int(np.percentile(self.store[first:], 95))
