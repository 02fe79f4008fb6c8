"""Where a run's numbers go. The only file that imports mlflow; without it they go to JSON lines.

Metrics of MLflow are append-only, so a run that resumes from a checkpoint must repeat no step that was logged before.
The log of a training therefore goes to disk first, where what was logged is dropped (``workflows.training.delivery``).
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from workflows.utils.json_io import write_text_atomically

STEP_KEY = "samples_seen"  # logged with every entry: tells a resumed run where the log ends
LATE_KEY = "late"  # mark of an entry that may be about a step which the log has gone past
DEDUP_TAG = "mfctl.once"  # tag of a run whose making may be asked for again: the value belongs to this run alone
MAX_METRICS_PER_CALL = 1000  # in one batch
MAX_PARAM_LENGTH = 500  # longest parameter value that every MLflow store accepts
METRICS, PARAMS, ARTIFACTS = "metrics.jsonl", "params.json", "artifacts.jsonl"

Entry = Mapping[str, Any]
"""What ``log`` wrote: step, time in seconds, and the metrics by name."""


class Tracker(Protocol):
    """One run's log."""

    @property
    def run_id(self) -> str | None:
        """Of MLflow, or None."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """What is known of one step; ``STEP`` is among it. Nothing happens for a step that was logged before.

        Without ``STEP``: something more about the latest step; what that has already is left out. ``late``: about any
        step; whoever calls knows what was said before.
        """
        ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def finish(self, *, failed: bool = False) -> None: ...


class NullTracker:
    """The tracker of every rank but the first."""

    run_id = None

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        pass

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def finish(self, *, failed: bool = False) -> None:
        pass


class JsonLinesTracker:
    """``metrics.jsonl`` and ``params.json`` in a folder; artifacts stay where they are and are listed."""

    run_id = None

    def __init__(self, folder: Path, *, ordered: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ordered = folder, ordered
        for name in (METRICS, ARTIFACTS):
            truncate_partial_line(folder / name)
        self._last, self._names = -1, set[str]()
        for entry, _ in iter_json_lines(folder / METRICS):
            if LATE_KEY not in entry:
                self._remember(entry["step"], entry)

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        if late:
            metrics = {**metrics, LATE_KEY: True}
        elif self._ordered:
            if step < self._last or (step == self._last and STEP_KEY in metrics):
                return
            self._remember(step, ())
            metrics = {name: value for name, value in metrics.items() if name not in self._names}
            self._remember(step, metrics)
        if not metrics:
            return
        entry = {"step": step, "time": time.time(), **metrics}
        with (self._folder / METRICS).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _remember(self, step: int, names: Iterable[str]) -> None:
        if step > self._last:
            self._last, self._names = step, set()
        self._names |= set(names)

    def params(self, values: Mapping[str, Any]) -> None:
        write_text_atomically(self._folder / PARAMS, json.dumps(dict(values), indent=1, default=str))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        with (self._folder / ARTIFACTS).open("a") as file:
            file.write(json.dumps({"path": str(path), "folder": folder}) + "\n")

    def finish(self, *, failed: bool = False) -> None:
        pass


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON lines file; what a crash cut short is left out."""
    return [entry for entry, _ in iter_json_lines(path)]


def iter_json_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The same from byte ``start`` on, each with the byte at which the next one begins."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            with suppress(json.JSONDecodeError):
                yield json.loads(line), start


def truncate_partial_line(path: Path) -> None:
    """Take away what a killed writer left of its last line: the next line must not be glued to it."""
    if path.exists():
        whole = max((end for _, end in iter_json_lines(path)), default=0)
        os.truncate(path, whole)
