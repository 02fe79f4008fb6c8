"""CPU time and memory of a process tree."""

import os
import threading
from collections import defaultdict
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import psutil

INTERVAL_S = 0.5  # between two samples
TICKS = os.sysconf("SC_CLK_TCK")  # kernel clock ticks per second
WARM_UP = 0.2  # share of the first samples that is left out


class _CpuAccount(NamedTuple):
    own: int  # kernel ticks
    children: int  # kernel ticks of ended children that the process waited for
    parent: int  # PID

    @property
    def total(self) -> int:
        return self.own + self.children


class ProcessTreeCpuClock:
    """CPU seconds of this process and its descendants, including those that have ended.

    The kernel adds an ended process to its parent's account when the parent waits for it. Ray does not wait, so the
    last reading of such a process is kept here. Accounts are integer ticks: a sum of floats depends on its order and
    could decrease when a process moves between accounts.
    """

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, float], _CpuAccount] = {}  # by PID and start time
        self._unreaped: dict[int, int] = defaultdict(int)  # by parent: ticks of ended processes in no account yet

    def read(self) -> float:
        """Return the CPU seconds so far.

        Use between the last reading and the end of a process may be missed.
        """
        now: dict[tuple[int, float], _CpuAccount] = {}
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                with process.oneshot():
                    times: Any = process.cpu_times()
                    own = round((times.user + times.system) * TICKS)
                    children = round((times.children_user + times.children_system) * TICKS)
                    account = _CpuAccount(own=own, children=children, parent=process.ppid())
                    now[process.pid, process.create_time()] = account
            except psutil.Error:
                continue
        ended: dict[int, int] = defaultdict(int)  # ticks by parent
        for process_id, account in self._accounts.items():
            if process_id not in now:
                ended[account.parent] += account.total
        for process_id, account in now.items():
            before = self._accounts.get(process_id)
            ended[process_id[0]] -= account.children - (before.children if before else 0)
        for parent, ticks in ended.items():
            self._unreaped[parent] = max(0, self._unreaped[parent] + ticks)
        self._accounts = now
        return (sum(self._unreaped.values()) + sum(account.total for account in now.values())) / TICKS


class ProcessTreeMonitor:
    """Context manager that samples memory and CPU of this process and its descendants."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # used inside the block; set on exit
        self._cpu_clock = ProcessTreeCpuClock()
        self.rss: list[int] = []  # bytes per sample, without shared pages (the object store)
        self.store: list[int] = []  # bytes per sample: largest shared memory of a process, the object store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._start_s = self._cpu_clock.read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.cpu_s = self._cpu_clock.read() - self._start_s

    def _sample(self) -> None:
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
            self._cpu_clock.read()
            self.rss.append(own)
            self.store.append(shared)
            if self._stop.wait(INTERVAL_S):
                return

    def peak_level(self) -> tuple[int, int]:
        """Return the 95th percentiles of private and shared memory after the warm-up, in bytes."""
        first = int(len(self.rss) * WARM_UP)
        return int(np.percentile(self.rss[first:], 95)), int(np.percentile(self.store[first:], 95))
