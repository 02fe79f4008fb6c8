"""Protocol of a run's log, and its form on disk as JSON lines.

Metrics of MLflow are append-only, so a run that resumes from a checkpoint must not repeat a logged step. The log of a
training run is therefore written to disk first, where repeated steps are dropped (``workflows.tracking.mlflow_sync``).
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from workflows.utils.json_io import write_text_atomically

STEP_KEY = "samples_seen"  # in every entry that begins a step: position of the log for a resumed run
LATE_KEY = "late"  # mark of an entry that may belong to an earlier step
DEDUP_TAG = "mfctl.once"  # tag with a unique value, so that a repeated creation finds the run
MAX_METRICS_PER_CALL = 1000  # per request
MAX_PARAM_LENGTH = 500  # longest parameter value that every MLflow store accepts
METRICS, PARAMS, ARTIFACTS = "metrics.jsonl", "params.json", "artifacts.jsonl"

Entry = Mapping[str, Any]
"""One logged entry: step, time in seconds, and the metrics by name."""


class Tracker(Protocol):
    """Log of one run."""

    @property
    def run_id(self) -> str | None:
        """MLflow's run id, or None."""
        ...

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Log the metrics of one step, which contain STEP_KEY; a step that was logged before is skipped.

        Without STEP_KEY, the metrics add to the latest step, except those that it has. With ``late`` they may belong
        to any step, and the caller must avoid repetitions.
        """
        ...

    def params(self, values: Mapping[str, Any]) -> None:
        """Log the parameters of the run."""
        ...

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, below ``folder`` in the run's artifacts."""
        ...

    def finish(self, *, failed: bool = False) -> None:
        """Close the log with its final status."""
        ...


class NullTracker:
    """Tracker of every rank except rank 0: discards everything."""

    run_id = None

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Discard the metrics."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Discard the parameters."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Discard the file."""

    def finish(self, *, failed: bool = False) -> None:
        """Do nothing."""


class JsonLinesTracker:
    """Tracker that writes ``metrics.jsonl`` and ``params.json`` into a folder and lists artifacts without a copy."""

    run_id = None

    def __init__(self, folder: Path, *, ordered: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ordered = folder, ordered
        for name in (METRICS, ARTIFACTS):
            truncate_partial_line(folder / name)
        self._last_step = -1
        self._names = set[str]()
        for entry, _ in iter_json_lines(folder / METRICS):
            if LATE_KEY not in entry:
                self._record_names(entry["step"], entry)

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Append one entry; see ``Tracker.log``."""
        if late:
            metrics = {**metrics, LATE_KEY: True}
        elif self._ordered:
            if step < self._last_step or (step == self._last_step and STEP_KEY in metrics):
                return
            self._record_names(step, ())
            metrics = {name: value for name, value in metrics.items() if name not in self._names}
            self._record_names(step, metrics)
        if not metrics:
            return
        entry = {"step": step, "time": time.time(), **metrics}
        with (self._folder / METRICS).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _record_names(self, step: int, names: Iterable[str]) -> None:
        if step > self._last_step:
            self._last_step, self._names = step, set()
        self._names |= set(names)

    def params(self, values: Mapping[str, Any]) -> None:
        """Write ``params.json``."""
        write_text_atomically(self._folder / PARAMS, json.dumps(dict(values), indent=1, default=str))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Append a file to ``artifacts.jsonl``."""
        with (self._folder / ARTIFACTS).open("a") as file:
            file.write(json.dumps({"path": str(path), "folder": folder}) + "\n")

    def finish(self, *, failed: bool = False) -> None:
        """Do nothing: every entry is on disk."""


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a JSON lines file without an incomplete last line."""
    return [entry for entry, _ in iter_json_lines(path)]


def iter_json_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the entries from byte ``start`` on, each with the byte at which the next one begins."""
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
    """Remove the incomplete last line of a killed writer, so that the next line starts on its own."""
    if path.exists():
        size = max((end for _, end in iter_json_lines(path)), default=0)
        os.truncate(path, size)
