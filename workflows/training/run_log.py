"""Log records of a run: the driver prints them to stderr, the ranks append them to the run directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG_FILE = "log.txt"
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
    """Append each message to the log of a run.

    The file is closed after each line: on a network file system other machines see it only then.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._path = run_dir / LOG_FILE

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(self.format(record) + "\n")
