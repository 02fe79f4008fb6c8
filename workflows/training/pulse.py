"""Signs of life: every rank says every two seconds where it is; the driver names those that fall silent or behind.

The beat comes from a thread of the rank, so a stopped or dead process falls silent, while one that computes for too
long beats on and is seen to keep the others waiting. Times are taken by the watcher's clock alone.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BEATS = "ranks"  # folder below the run's
INTERVAL = 2.0  # seconds between two beats
SILENT = 20.0  # seconds without a beat that are reported
SLOW = 30.0  # seconds that a rank may keep the others waiting
WAITING = "waiting for the others"


class Pulse:
    """One rank's beat."""

    def __init__(self, folder: Path, rank: int, interval: float = INTERVAL) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._interval = folder / f"{rank:05d}.json", interval
        self._who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._at: tuple[int, str] = (0, "starting")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def __call__(self, step: int, doing: str) -> None:
        """Note where this rank is; costs nothing."""
        self._at = step, doing

    def close(self) -> None:
        """This rank is done."""
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        count = 0
        while True:
            step, doing = self._at
            count += 1
            text = json.dumps({**self._who, "beat": count, "step": step, "doing": doing})
            temporary = self._path.with_name(f".tmp-{secrets.token_hex(4)}")
            try:
                temporary.write_text(text)
                temporary.replace(self._path)
            except OSError:  # a beat that cannot be written is a missing beat: training goes on
                temporary.unlink(missing_ok=True)
            if self._stop.wait(self._interval):
                return


@dataclass(kw_only=True)
class _Seen:
    """What the watcher knows of one rank; times by its own clock."""

    beat: object
    beat_since: float
    at: tuple[int, str]
    at_since: float
    name: str
    silent: bool = False  # reported
    slow: int | None = None  # step for which it was reported


class Watch:
    """Looks at the beats of all ranks and says who is silent or keeps the others waiting."""

    def __init__(self, folder: Path, say: Callable[[str], None], silent: float = SILENT, slow: float = SLOW) -> None:
        self._folder, self._say, self._silent, self._slow = folder, say, silent, slow
        self._ranks: dict[str, _Seen] = {}

    def look(self, now: float) -> None:
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
        seen = self._ranks.setdefault(name, _Seen(beat=beat, beat_since=now, at=at, at_since=now, name=who))
        seen.name = who
        if seen.beat != beat:
            seen.beat, seen.beat_since = beat, now
        if seen.at != at:
            seen.at, seen.at_since = at, now

    def _judge_silence(self, seen: _Seen, now: float) -> None:
        quiet = now - seen.beat_since
        if quiet >= self._silent and not seen.silent:
            seen.silent = True
            self._say(
                f"{seen.name} has given no sign of life for {quiet:.0f} s; it was at step {seen.at[0]}, {seen.at[1]}: "
                "a stopped or dead process, or a machine out of reach. The others wait for it"
            )
        elif seen.silent and quiet < self._silent:
            seen.silent = False
            self._say(f"{seen.name} is back, at step {seen.at[0]}")

    def _judge_pace(self, now: float) -> None:
        waiting = [seen for seen in self._ranks.values() if seen.at[1] == WAITING]
        for seen in self._ranks.values():
            step, doing = seen.at
            kept = [other for other in waiting if other.at[0] >= step]
            if doing == WAITING or not kept or seen.silent or seen.slow == step:
                continue
            patience = min(now - other.at_since for other in kept)
            if patience >= self._slow:
                seen.slow = step
                self._say(f"{seen.name} has kept others waiting for {patience:.0f} s: it is still {doing} step {step}")


@contextmanager
def watched(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    """While the block runs, ``say`` is told of ranks that fall silent or behind."""
    for old in folder.glob("[0-9]*.json"):
        old.unlink()
    watch, stop = Watch(folder, say), threading.Event()

    def run() -> None:
        while not stop.wait(1.0):
            watch.look(time.monotonic())

    thread = threading.Thread(target=run, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
