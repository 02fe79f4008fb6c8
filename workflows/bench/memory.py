"""How much memory a run of preprocessing takes, and whether it grows with the number of clips."""

import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

from preprocessing.config import PreprocessConfig

EVERY = 0.5  # seconds between two looks
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the kernel's accounts
WARM_UP = 0.2  # share of the looks that is left out
BAR = 1.10  # memory for many clips over memory for few


class Clock:
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


class Watch:
    """Looks at the memory and the CPU of this process and of all below it while a ``with`` block runs."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # used inside the block, known behind it
        self._clock = Clock()
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
            if self._stop.wait(EVERY):
                return

    def level(self) -> tuple[int, int]:
        """95th percentile of own and of shared memory after the warm-up, bytes."""
        first = int(len(self.rss) * WARM_UP)
        return int(np.percentile(self.rss[first:], 95)), int(np.percentile(self.store[first:], 95))


def bench_memory(*, few: int, many: int, workers: int) -> dict[str, Any]:
    """Memory for ``few`` and for ``many`` clips of one second, with the same workers."""
    rows = {clips: _measure(clips, workers) for clips in (few, many)}
    ratio = rows[many]["rss_bytes"] / rows[few]["rss_bytes"]
    return {"workers": workers, "clips": {str(k): v for k, v in rows.items()}, "memory_ratio": ratio, "bar": BAR}


def _measure(clips: int, workers: int) -> Mapping[str, Any]:
    from workflows.bench.preprocess import memory_files
    from workflows.preprocess import preprocess
    from workflows.training.launch import ray_running

    config = PreprocessConfig(window_seconds=Fraction(1), sources_per_unit=1, workers=workers, keep_duplicates=True)
    with tempfile.TemporaryDirectory(prefix="mfctl-bench-") as folder, ray_running(workers):
        media = Path(folder, "media")
        media.mkdir()
        sources = memory_files(media, clips)
        warm = replace(config, min_chunks=1, window_seconds=Fraction(1, 2))
        preprocess([str(media / "000000.mp4")], f"{folder}/warm", warm, progress=lambda *_: None)
        with Watch() as watch:
            counts = preprocess([str(media)], f"{folder}/set", config, progress=lambda *_: None)
    own, store = watch.level()
    return {"sources": sources, "accepted": counts["accepted"], "rss_bytes": own, "object_store_bytes": store}


def render(result: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{row['accepted']:7d} clips of {row['sources']} source(s): {row['rss_bytes'] / 1e6:.0f} MB, "
        f"object store {row['object_store_bytes'] / 1e6:.0f} MB"
        for row in result["clips"].values()
    ]
    return "\n".join(
        [*lines, f"ratio {result['memory_ratio']:.3f} (bar {result['bar']}), {result['workers']} worker(s)"]
    )
