"""Signs of life: every rank says every two seconds where it is; the driver names those that fall silent or behind.

The beat comes from a thread of the rank, so a stopped or dead process falls silent, while one that computes for too
long beats on and is seen to keep the others waiting. It also says where in the code the rank is: those that hang in a
collective operation, whatever they were doing, wait for the one that has not reached it. Times are taken by the
watcher's clock alone.
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
INTERVAL_S = 2.0  # seconds between two beats
SILENT_AFTER_S = 20.0  # seconds without a beat that are reported
SLOW_AFTER_S = 30.0  # seconds that a rank may keep the others waiting
WAITING_LABEL = "waiting for the others"
COLLECTIVES = ("torch.distributed", "deepspeed.comm")  # packages whose functions wait for other ranks


class Heartbeat:
    """One rank's beat."""

    def __init__(self, folder: Path, rank: int, interval: float = INTERVAL_S) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._interval = folder / f"{rank:05d}.json", interval
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._at: tuple[int, str] = (0, "starting")
        self._trains = threading.get_ident()
        self._exit = ExitStack()
        self._exit.callback(self._path.unlink, missing_ok=True)
        self._exit.enter_context(background_thread(self._run, name="heartbeat"))

    def __call__(self, step: int, doing: str) -> None:
        """Note where this rank is; costs nothing."""
        self._at = step, doing

    def close(self) -> None:
        """This rank is done."""
        self._exit.close()

    def _run(self, stop: threading.Event) -> None:
        count = 0
        while True:
            step, doing = self._at
            count += 1
            facts = {**self._who, "beat": count, "step": step, "doing": doing, **vars(stack_location(self._trains))}
            text = json.dumps(facts)
            with suppress(OSError):  # a beat that cannot be written is a missing beat: training goes on
                write_text_atomically(self._path, text)
            if stop.wait(self._interval):
                return


@dataclass(frozen=True, kw_only=True)
class StackLocation:
    """Where in the code a thread is."""

    line: str = ""  # innermost
    stack: int = 0  # a number that stays the same while nothing moves
    collective: str = ""  # what it waits for other ranks in


def stack_location(thread: int) -> StackLocation:
    """Of a thread of this process, at this moment."""
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
class _Seen:
    """What the watcher knows of one rank; times by its own clock."""

    beat: object
    beat_since: float
    at: tuple[int, str]
    place: StackLocation
    at_since: float  # nothing has moved since
    name: str
    silent: bool = False  # reported
    slow: int | None = None  # step for which it was reported

    @property
    def waits(self) -> bool:
        return self.at[1] == WAITING_LABEL or bool(self.place.collective)


class HeartbeatMonitor:
    """Looks at the beats of all ranks and says who is silent or keeps the others waiting."""

    def __init__(self, folder: Path, silent: float = SILENT_AFTER_S, slow: float = SLOW_AFTER_S) -> None:
        self._folder, self._silent, self._slow = folder, silent, slow
        self._ranks: dict[str, _Seen] = {}

    def check(self, now: float) -> None:
        """``now``: seconds of a clock that does not jump."""
        present = {path.name: path for path in self._folder.glob("[0-9]*.json")}
        self._ranks = {name: seen for name, seen in self._ranks.items() if name in present}
        for name, path in present.items():
            self._read(name, path, now)
        for seen in self._ranks.values():
            self._judge_silence(seen, now)
        self._judge_pace(now)

    def _read(self, name: str, path: Path, now: float) -> None:
        try:
            facts = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        who = f"rank {facts['rank']} (process {facts['pid']} on {facts['host']})"
        beat, at = (facts["pid"], facts["beat"]), (facts["step"], facts["doing"])
        place = StackLocation(**{key: facts[key] for key in vars(StackLocation()) if key in facts})
        new = _Seen(beat=beat, beat_since=now, at=at, place=place, at_since=now, name=who)
        seen = self._ranks.setdefault(name, new)
        seen.name = who
        if seen.beat != beat:
            seen.beat, seen.beat_since = beat, now
        if (seen.at, seen.place) != (at, place):
            seen.at, seen.place, seen.at_since = at, place, now

    def _judge_silence(self, seen: _Seen, now: float) -> None:
        quiet = now - seen.beat_since
        if quiet >= self._silent and not seen.silent:
            seen.silent = True
            _LOGGER.warning(
                f"{seen.name} has given no sign of life for {quiet:.0f} s; it was at step {seen.at[0]}, {seen.at[1]}: "
                "a stopped or dead process, or a machine out of reach. The others wait for it"
            )
        elif seen.silent and quiet < self._silent:
            seen.silent = False
            _LOGGER.info(f"{seen.name} is back, at step {seen.at[0]}")

    def _judge_pace(self, now: float) -> None:
        waiting = [seen for seen in self._ranks.values() if seen.waits]
        for seen in self._ranks.values():
            step, doing = seen.at
            kept = [other for other in waiting if other.at[0] >= step]
            if seen.waits or not kept or seen.silent or seen.slow == step:
                continue
            patience = min(now - other.at_since for other in kept)
            if patience >= self._slow:
                seen.slow = step
                _LOGGER.warning(
                    f"{seen.name} has kept others waiting for {patience:.0f} s: it is still {doing} step {step}"
                    + (f" (at {seen.place.line})" if seen.place.line else "")
                )
        if len(waiting) == len(self._ranks) > 1:
            self._judge_mismatch(waiting, now)

    def _judge_mismatch(self, ranks: list[_Seen], now: float) -> None:
        """All wait, each for the others: they are in different operations, or a message was lost."""
        patience = min(now - seen.at_since for seen in ranks)
        if patience >= self._slow and any(seen.slow != seen.at[0] for seen in ranks):
            where = "; ".join(
                f"{s.name} in {s.place.collective or s.at[1]}, step {s.at[0]}"
                for s in sorted(ranks, key=lambda s: s.name)
            )
            _LOGGER.warning(f"all ranks have waited for each other for {patience:.0f} s: {where}")
            for seen in ranks:
                seen.slow = seen.at[0]


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
