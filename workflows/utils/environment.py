"""Environment of all processes: defaults for Ray and MLflow, base directory, tracking URI, free ports."""

import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path

from mfcore.errors import UserInputError

DEFAULT_ENV = {
    # no telemetry
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Ray's default of 15 starves workers when other processes run
    "RAY_worker_niceness": "0",
    # the next default of Ray; setting it silences a warning
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # gRPC's handlers crash about 2% of the processes that Ray forks while other threads call gRPC
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
OBJECT_STORES = ("s3", "gs", "memory")  # schemes of datasets; memory: tests
MAX_NAME_BYTES = 240  # of a file or folder; file systems allow 255, and temporary names add a suffix
CWD_ENV = "MFCTL_CWD"
"""Variable of a submitted job: the working directory of the user's command."""


def apply_defaults() -> None:
    """Set the variables of DEFAULT_ENV that are not set; call it before the first import of ray or mlflow."""
    for name, value in DEFAULT_ENV.items():
        os.environ.setdefault(name, value)


def base_directory() -> Path:
    """Return the base of relative paths; a submitted job runs in a copy, its paths refer to the original tree."""
    try:
        return Path(os.environ.get(CWD_ENV) or Path.cwd()).absolute()
    except FileNotFoundError:
        raise UserInputError("the current directory was deleted. Change to an existing one, e.g. cd ~") from None


def chdir_to_base() -> None:
    """Change to the submitter's directory if it exists on this machine."""
    base = base_directory()
    if base.is_dir():
        os.chdir(base)


def resolve_path(path: str) -> str:
    """Return an absolute path; a URI is unchanged. Raises UserInputError for the home folder of an unknown user."""
    if "://" in path:
        return path
    if longest := next((part for part in path.split("/") if len(os.fsencode(part)) > MAX_NAME_BYTES), None):
        raise UserInputError(
            f"the name {longest[:40]}... has {len(os.fsencode(longest))} bytes. Use at most {MAX_NAME_BYTES}"
        )
    try:
        return os.path.normpath(base_directory() / Path(path).expanduser())
    except RuntimeError:
        raise UserInputError(f"{path}: no user of this name has a home folder. Write the whole path") from None


def hide_passwords(text: str) -> str:
    """Return ``text`` with the passwords of all URIs in it replaced by ``***``."""
    return re.sub(r"(\w://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def resolve_dataset(path: str) -> str:
    """Return an absolute path, or the URI of a bucket. Raises UserInputError for another URI."""
    scheme, separator, rest = path.partition("://")
    if not separator or scheme == "file":
        return resolve_path(path)
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in OBJECT_STORES)
        raise UserInputError(f"{path}: a dataset is in a folder or in object storage ({known}). Choose one of these")
    if not rest.partition("/")[0]:
        raise UserInputError(f"{path} names no bucket. Write {scheme}://bucket/prefix")
    return path


def resolve_existing_path(path: str) -> str:
    """Return an absolute path if the file exists, else ``path``, which may be the name of a run."""
    return resolve_path(path) if os.path.exists(resolve_path(path)) else path


def find_free_ports(count: int) -> list[int]:
    """Return different TCP ports of the loopback interface that no process listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def tracking_uri(runs_dir: str | Path = "runs") -> str:
    """Return ``MLFLOW_TRACKING_URI``, or a SQLite file in ``runs_dir`` by absolute path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{resolve_path(str(runs_dir))}/mlflow.db"
    prefix = "sqlite:///"
    return prefix + resolve_path(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri
