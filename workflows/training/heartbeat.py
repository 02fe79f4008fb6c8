"""Heartbeats: each rank writes its status every two seconds; the driver reports ranks that are silent or slow.

A thread of the rank writes the status. A stopped or dead process sends no heartbeat. A process that computes too long
still sends them, and keeps the other ranks waiting. The status has the line of code: ranks that hang in a collective
operation wait for the rank that has not reached it. Only the monitor's clock is used.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from workflows.utils.json_io import write_text_atomically
from workflows.utils.threads import background_thread

_LOGGER = logging.getLogger(__name__)
HEARTBEAT_DIR = "ranks"  # folder below the run's
INTERVAL_S = 2.0  # seconds between two heartbeats
SILENT_AFTER_S = 20.0  # seconds without a heartbeat until a report
SLOW_AFTER_S = 30.0  # seconds that a rank may keep the others waiting until a report
WAITING_LABEL = "waiting for the others"
COLLECTIVES = ("torch.distributed", "deepspeed.comm")  # packages with functions that wait for other ranks


class Heartbeat:
    """Heartbeat of one rank, written by a thread."""

    def __init__(self, folder: Path, rank: int, interval: float = INTERVAL_S) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._interval = folder / f"{rank:05d}.json", interval
        self._process = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._activity: tuple[int, str] = (0, "starting")
        self._training_thread = threading.get_ident()
        self._exit = ExitStack()
        self._exit.callback(self._path.unlink, missing_ok=True)
        self._exit.enter_context(background_thread(self._run, name="heartbeat"))

    def __call__(self, step: int, activity: str) -> None:
        """Set the step and the activity of this rank."""
        self._activity = step, activity

    def close(self) -> None:
        """Stop the thread and delete the file: this rank has finished."""
        self._exit.close()

    def _run(self, stop: threading.Event) -> None:
        count = 0
        while True:
            step, activity = self._activity
            count += 1
            status = {
                **self._process,
                "beat": count,
                "step": step,
                "doing": activity,
                **vars(stack_location(self._training_thread)),
            }
            text = json.dumps(status)
            with suppress(OSError):  # a missing heartbeat must not stop the training
                write_text_atomically(self._path, text, durable=False)
            if stop.wait(self._interval):
                return


@dataclass(frozen=True, kw_only=True)
class StackLocation:
    """Position of a thread in the code."""

    line: str = ""  # of the innermost frame
    stack: int = 0  # hash of the stack, to detect that nothing moves
    collective: str = ""  # function that waits for other ranks


def stack_location(thread: int) -> StackLocation:
    """Return the current position of a thread of this process."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return StackLocation()
    line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, {frame.f_code.co_name}"
    stack: list[tuple[str, int]] = []
    collective = ""
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno))
        if not collective and str(frame.f_globals.get("__name__")).startswith(COLLECTIVES):
            collective = frame.f_code.co_name
        frame = frame.f_back
    return StackLocation(line=line, stack=hash(tuple(stack)), collective=collective)


@dataclass(kw_only=True)
class _RankStatus:
    """Latest status of one rank; times by the clock of the monitor."""

    beat: object
    beat_since: float
    activity: tuple[int, str]
    location: StackLocation
    activity_since: float  # nothing has moved since
    name: str
    silent: bool = False  # reported
    slow: int | None = None  # step for which it was reported

    @property
    def waits(self) -> bool:
        return self.activity[1] == WAITING_LABEL or bool(self.location.collective)


class HeartbeatMonitor:
    """Monitor of the heartbeats of all ranks; logs ranks that are silent or keep others waiting."""

    def __init__(self, folder: Path, silent: float = SILENT_AFTER_S, slow: float = SLOW_AFTER_S) -> None:
        self._folder, self._silent, self._slow = folder, silent, slow
        self._ranks: dict[str, _RankStatus] = {}

    def check(self, now: float) -> None:
        """Read all heartbeats and log what changed; ``now``: seconds of a monotonic clock."""
        present = {path.name: path for path in self._folder.glob("[0-9]*.json")}
        self._ranks = {name: rank for name, rank in self._ranks.items() if name in present}
        for name, path in present.items():
            self._read(name, path, now)
        for rank in self._ranks.values():
            self._check_silence(rank, now)
        self._check_pace(now)

    def _read(self, key: str, path: Path, now: float) -> None:
        try:
            status = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        name = f"rank {status['rank']} (process {status['pid']} on {status['host']})"
        beat, position = (status["pid"], status["beat"]), (status["step"], status["doing"])
        location = StackLocation(**{key: status[key] for key in vars(StackLocation()) if key in status})
        new = _RankStatus(
            beat=beat, beat_since=now, activity=position, location=location, activity_since=now, name=name
        )
        rank = self._ranks.setdefault(key, new)
        rank.name = name
        if rank.beat != beat:
            rank.beat, rank.beat_since = beat, now
        if (rank.activity, rank.location) != (position, location):
            rank.activity, rank.location, rank.activity_since = position, location, now

    def _check_silence(self, rank: _RankStatus, now: float) -> None:
        silence = now - rank.beat_since
        if silence >= self._silent and not rank.silent:
            rank.silent = True
            _LOGGER.warning(
                f"no heartbeat of {rank.name} for {silence:.0f} s (last: step {rank.activity[0]}, {rank.activity[1]}). "
                "The process is stopped or dead, or its machine is unreachable. The other ranks are waiting"
            )
        elif rank.silent and silence < self._silent:
            rank.silent = False
            _LOGGER.info(f"{rank.name} sends heartbeats again, at step {rank.activity[0]}")

    def _check_pace(self, now: float) -> None:
        waiting = [rank for rank in self._ranks.values() if rank.waits]
        for rank in self._ranks.values():
            step, activity = rank.activity
            delayed = [other for other in waiting if other.activity[0] >= step]
            if rank.waits or not delayed or rank.silent or rank.slow == step:
                continue
            waited = min(now - other.activity_since for other in delayed)
            if waited >= self._slow:
                rank.slow = step
                _LOGGER.warning(
                    f"{rank.name} has kept other ranks waiting for {waited:.0f} s: still {activity} step {step}"
                    + (f" (at {rank.location.line})" if rank.location.line else "")
                )
        if len(waiting) == len(self._ranks) > 1:
            self._check_mismatch(waiting, now)

    def _check_mismatch(self, ranks: list[_RankStatus], now: float) -> None:
        """Log that all ranks wait for each other: in different operations, or after a lost message."""
        waited = min(now - rank.activity_since for rank in ranks)
        if waited >= self._slow and any(rank.slow != rank.activity[0] for rank in ranks):
            where = "; ".join(
                f"{s.name} in {s.location.collective or s.activity[1]}, step {s.activity[0]}"
                for s in sorted(ranks, key=lambda s: s.name)
            )
            _LOGGER.warning(f"all ranks have waited for each other for {waited:.0f} s: {where}")
            for rank in ranks:
                rank.slow = rank.activity[0]


@contextmanager
def monitor_heartbeats(folder: Path) -> Generator[None]:
    """Log ranks that are silent or slow while the block runs."""
    for old in folder.glob("[0-9]*.json"):
        old.unlink()
    monitor = HeartbeatMonitor(folder)

    def check(stop: threading.Event) -> None:
        while not stop.wait(1.0):
            monitor.check(time.monotonic())

    with background_thread(check, name="heartbeat monitor"):
        yield
