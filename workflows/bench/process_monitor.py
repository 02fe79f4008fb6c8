import os
import threading
from collections import defaultdict
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import psutil

INTERVAL_S = 0.5  # between two samples
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the kernel's accounts
WARM_UP = 0.2  # share of the first samples that is left out


class _CpuAccount(NamedTuple):
    own: int  # kernel ticks
    children: int  # kernel ticks of ended children that the process waited for
    parent: int  # PID

    @property
    def total(self) -> int:
        return self.own + self.children


class ProcessTreeCpuClock:
    """CPU seconds of this process and of all below it, those that have ended included.

    A process that ends is added to its parent's account, if the parent asks for it. Ray's does not: what such a process
    had when it was last seen is kept here. Accounts are kept in the kernel's whole ticks: a sum of seconds depends on
    its order, and could run backwards when a process moves from one account to another.
    """

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, float], _CpuAccount] = {}  # by PID and start time
        self._unreaped: dict[int, int] = defaultdict(int)  # by parent: ticks of ended processes in no account yet

    def read(self) -> float:
        """Look now: what a process used between the last look and its end may be missed."""
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
    """Looks at the memory and the CPU of this process and of all below it while a ``with`` block runs."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # used inside the block, known behind it
        self._cpu_clock = ProcessTreeCpuClock()
        self.rss: list[int] = []  # bytes, shared pages (the object store) left out
        self.store: list[int] = []  # bytes of shared pages of the process that has most: the object store's
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
        """95th percentile of own and of shared memory after the warm-up, bytes."""
        first = int(len(self.rss) * WARM_UP)
        return int(np.percentile(self.rss[first:], 95)), int(np.percentile(self.store[first:], 95))
