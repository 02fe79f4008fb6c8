"""Ray of this process: a new one on the loopback with a token, or the cluster of ``RAY_ADDRESS``.

Ray runs pickled functions of every client. A new Ray therefore accepts clients with its token only: a random value in a
file with mode 0600, for one head or one process.
"""

import atexit
import logging
import os
import secrets
import shutil
import signal
import threading
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from preprocessing.io.processes import scratch_prefix

TOKEN_FILE = "auth_token"
USER_TOKEN_FILE = "~/.ray/auth_token"
"""The token of Ray's own tools (``ray get-auth-token --generate``)."""


def start_ray(*, num_cpus: int | None = None, num_gpus: int | None = None) -> None:
    """Start Ray, or connect to the cluster of ``RAY_ADDRESS``. No effect if this process has a Ray.

    A new Ray has the token of this process and listens on 127.0.0.1 only. The first SIGTERM then raises
    KeyboardInterrupt, as SIGINT does: the handler of Ray aborts with a native stack.

    Args:
        num_cpus: CPUs of a new Ray (default: all of this machine).
        num_gpus: Logical GPUs of a new Ray (default: those of this machine).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 starves workers next to other processes
    import ray

    if ray.is_initialized():
        return
    quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" in os.environ:
        if find_token():  # a cluster without tokens ignores it
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        _reload_environment()
        ray.init(**quiet)
    else:
        folder = _private_folder()
        os.environ.pop("RAY_AUTH_TOKEN", None)  # precedes the file
        os.environ |= token_environment(folder / TOKEN_FILE)
        _reload_environment()
        _use_loopback()
        # "local": without it Ray connects to any head that has run on this machine. "r": Ray lets all users write there
        ray.init(
            "local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "r"),
            **quiet,
        )
    _interrupt_on_sigterm()


def token_environment(token: Path) -> dict[str, str]:
    """Return the variables of a Ray head on this machine and its clients: their token, the loopback as its address."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray replaces the loopback by the address of the machine unless it runs on Windows or macOS, where this
        # variable decides
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def write_token(folder: Path) -> Path:
    """Write a new token into ``folder``, readable by this user only; return its path."""
    path = folder / TOKEN_FILE
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def find_token() -> str:
    """Return the token that Ray's clients use: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or the user's file; "" if none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or USER_TOKEN_FILE).expanduser()
    return path.read_text().strip() if path.is_file() else ""


@cache
def _private_folder() -> Path:
    """Create the folder of this process's Ray, with its token; it is removed when the process ends."""
    # below /tmp with a short name: it holds Unix sockets, with paths of at most 107 bytes
    folder = Path("/tmp", scratch_prefix())
    folder.mkdir(mode=0o700)
    atexit.register(_remove, folder)
    write_token(folder)
    return folder


def _remove(folder: Path) -> None:
    import ray

    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _reload_environment() -> None:
    """Make Ray read the variables of authentication again: it reads them when it is imported."""
    from ray import _raylet

    native: Any = _raylet
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


def _use_loopback() -> None:
    """Do in this process what the variable of ``token_environment`` does in new ones."""
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def _interrupt_on_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread():
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
