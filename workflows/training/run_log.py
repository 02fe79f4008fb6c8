"""Log of a run: the ranks append to files in the run directory, the driver shows new entries.

Files in the run directory:

    log.txt     messages as plain lines
    log.jsonl   the same entries for the driver: {"text": message} or a ProgressEvent
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workflows.tracking.tracker import iter_json_lines
from workflows.utils.progress import ProgressEvent, training_progress
from workflows.utils.threads import background_thread

LOG_FILE = "log.txt"
EVENTS_FILE = "log.jsonl"
_LOGGER = logging.getLogger("workflows")  # parent of the loggers of all modules


@contextmanager
def redirect_logs(handler: logging.Handler) -> Iterator[None]:
    """Send the records of this package to `handler` only; of nested blocks the innermost one counts.

    Records do not propagate: Ray Train and Alembic install root handlers that would print them twice.
    """
    handlers, level, propagate = _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate
    _LOGGER.handlers, _LOGGER.propagate = [handler], False
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.handlers, _LOGGER.propagate = handlers, propagate
        _LOGGER.setLevel(level)
        handler.close()


class RunLogHandler(logging.Handler):
    """Append each message to the log of a run. The message is a text or a ProgressEvent."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line to each file."""
        text, event = self.format(record), record.msg
        entry: dict[str, Any] = asdict(event) if isinstance(event, ProgressEvent) else {"text": text}
        with suppress(OSError):  # a missing message must not stop the training
            _append_line(self._run_dir / LOG_FILE, text)
            _append_line(self._run_dir / EVENTS_FILE, json.dumps(entry))


def _append_line(path: Path, line: str) -> None:
    """Append and close: on a network file system other machines see a line only then."""
    with path.open("a") as file:
        file.write(line + "\n")


@contextmanager
def show_run_log(run_dir: Path) -> Iterator[None]:
    """Show on standard error what is appended to the log while the block runs."""
    path = run_dir / EVENTS_FILE
    start = path.stat().st_size if path.exists() else 0

    def follow(stop: threading.Event) -> None:
        position, is_last = start, False
        while not is_last:
            is_last = stop.wait(0.3)
            for entry, end in iter_json_lines(path, position):
                show(ProgressEvent(**entry) if "step" in entry else entry["text"])
                position = end

    with training_progress() as show, background_thread(follow, name="log"):
        yield
