"""Processes and what they leave: children that end with their parent, temporary folders of those that were killed."""

import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

_SCRATCH = re.compile(r"mfctl-([0-9a-f]{8})-(\d+)-(\d+)-.*")


def process_start_time(pid: int) -> str | None:
    """Return the start time of a process, to detect reuse of its PID; None if no process with this PID runs.

    The unit is clock ticks since boot: changes of the system clock do not affect it.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        seconds = process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None
    return str(round(seconds * os.sysconf("SC_CLK_TCK")))


def limit_process(command: Sequence[str], memory: int) -> list[str]:
    """A command whose process has at most so many bytes of data, and ends when the thread that started it does.

    Where util-linux is not installed it is the command as it was.
    """
    limit = ["prlimit", f"--data={memory}"] if _installed("prlimit") else []
    tied = ["setpriv", "--pdeathsig", "KILL"] if _installed("setpriv") else []
    return [*limit, *tied, *command]


@cache
def _installed(program: str) -> bool:
    return shutil.which(program) is not None


# ---------------------------------------------------------------------------------------------------- temporary folders


@contextmanager
def scratch_dir() -> Generator[Path]:
    """A temporary folder, removed at the end, and by ``sweep_scratch`` if this process is killed before."""
    name = f"mfctl-{_host()}-{os.getpid()}-{process_start_time(os.getpid()) or 0}-"
    with tempfile.TemporaryDirectory(prefix=name) as folder:
        yield Path(folder)


def delete_stale_scratch() -> None:
    """Remove the temporary folders that killed processes of this machine left."""
    for path in Path(tempfile.gettempdir()).glob("mfctl-*"):
        match = _SCRATCH.fullmatch(path.name)
        if match and match[1] == _host() and match[3] not in ("0", process_start_time(int(match[2]))):
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
