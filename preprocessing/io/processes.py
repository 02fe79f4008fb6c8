"""Child processes that end with their parent, and temporary folders of killed processes."""

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
    """Return the start time of a process, to detect reuse of its PID; None without a process.

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
    """Return a command with a limit of `memory` bytes that ends with the calling thread.

    Without util-linux, the command is returned unchanged.
    """
    limit = ["prlimit", f"--data={memory}"] if _is_installed("prlimit") else []
    kill_with_parent = ["setpriv", "--pdeathsig", "KILL"] if _is_installed("setpriv") else []
    return [*limit, *kill_with_parent, *command]


@cache
def _is_installed(program: str) -> bool:
    return shutil.which(program) is not None


# ---------------------------------------------------------------------------------------------------- temporary folders


@contextmanager
def scratch_dir() -> Generator[Path]:
    """Yield a temporary folder; `delete_stale_scratch` removes it if this process is killed."""
    with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as folder:
        yield Path(folder)


def scratch_prefix() -> str:
    """Return the start of the names of this process's temporary folders, at most 34 characters."""
    return f"mfctl-{_host_digest()}-{os.getpid()}-{process_start_time(os.getpid()) or 0}-"


def delete_stale_scratch() -> None:
    """Remove the temporary folders of killed processes of this machine."""
    for path in Path(tempfile.gettempdir()).glob("mfctl-*"):
        match = _SCRATCH.fullmatch(path.name)
        if match and match[1] == _host_digest() and match[3] not in ("0", process_start_time(int(match[2]))):
            shutil.rmtree(path, ignore_errors=True)


def _host_digest() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
