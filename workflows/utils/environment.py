"""What every process of ours starts with: no telemetry, one authentication mode, one idea of the current directory."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

DEFAULT_ENV = {
    # nothing phones home
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # ray.init() may leave a token in the home directory that a head started later demands and a job client does not
    # send: the mode is therefore the same, and explicit, in every process
    "RAY_AUTH_MODE": "disabled",
    # Ray gives its workers the lowest priority but four: beside anything else they would hardly run. Ours are the work
    "RAY_worker_niceness": "0",
    # the behaviour Ray announces as its next default; saying so silences its warning
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CWD_ENV = "MFCTL_CWD"
"""Set in a submitted job: the directory in which the user typed the command."""


def apply_defaults() -> None:
    """Set what the user has not set. Before the first import of ray or mlflow."""
    for name, value in DEFAULT_ENV.items():
        os.environ.setdefault(name, value)


def base_directory() -> Path:
    """What relative paths are relative to: a submitted job runs in a copy of the tree, its paths mean the original."""
    return Path(os.environ.get(CWD_ENV) or Path.cwd()).absolute()


def chdir_to_base() -> None:
    """Make the submitter's directory the current one where this machine has it (this machine, or shared storage)."""
    base = base_directory()
    if base.is_dir():
        os.chdir(base)


def resolve_path(path: str) -> str:
    """An absolute path, or the URI as it is."""
    return path if "://" in path else os.path.normpath(base_directory() / Path(path).expanduser())


def resolve_existing_path(path: str) -> str:
    """As ``absolute`` where such a file exists; a name (of a run, say) stays a name."""
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
