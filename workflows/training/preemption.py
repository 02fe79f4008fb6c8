"""Stop requests: preemption notices, and SIGTERM to a worker or to the driver.

Ranks read them between two steps, agree, save a checkpoint and end. A second SIGTERM ends a process as usual.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "_stop"
"""File in the run directory, with the driver's token: the stop request of a driver to its workers."""
POLL_S = 1.0  # seconds between queries of the file system and of Ray

_received: list[str] = []
_wakeup_sockets: list[socket.socket] = []  # both ends of the pair that receives signal numbers


def install_sigterm_handler() -> None:
    """Turn the first SIGTERM into a stop request. No effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    _received.clear()
    _on_sigterm(_received.append)
    _install_wakeup_thread(_received.append)


def _install_wakeup_thread(report: Callable[[str], object]) -> None:
    """Report a SIGTERM from a thread as well.

    Python runs signal handlers when the main thread executes Python code. In a Ray worker it is in native code between
    calls, and on a busy machine a run may end before the next call. The wakeup socket receives the signal at once.
    """
    if _wakeup_sockets:
        return
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    if (previous := signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(previous)  # of an event loop, which runs Python often enough
        return
    _wakeup_sockets.extend((inner, outer))

    def read() -> None:
        while numbers := inner.recv(16):
            if signal.SIGTERM in numbers:
                report(_sigterm_message())

    threading.Thread(target=read, name="sigterm", daemon=True).start()


def _sigterm_message() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} received SIGTERM"


def _on_sigterm(report: Callable[[str], object]) -> Callable[[], object]:
    """Report the first SIGTERM, then restore the previous handler. Return a function that restores it now."""
    previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def restore() -> None:
        signal.signal(signal.SIGTERM, previous)

    def receive(number: int, frame: FrameType | None) -> None:
        del number, frame
        report(_sigterm_message())
        restore()

    signal.signal(signal.SIGTERM, receive)
    return restore


class PreemptionMonitor:
    """Stop requests to one rank: SIGTERM, the driver's file, and ``external``, such as Ray's preemption watcher."""

    def __init__(self, run_dir: Path, token: str, external: Callable[[], str] = lambda: "") -> None:
        self._file, self._token, self._external = run_dir / STOP_FILE, token, external
        self._last_query, self._reason = 0.0, ""

    def __call__(self) -> str:
        """Return the reason of a stop request to this rank, else "". Queries files and Ray once per second."""
        if _received:
            return _received[0]
        if not self._reason and time.monotonic() - self._last_query > POLL_S:
            self._last_query = time.monotonic()
            self._reason = self._external() or self._read_stop_file()
        return self._reason

    def _read_stop_file(self) -> str:
        try:
            token, _, text = self._file.read_text().partition("\n")
        except OSError:
            return ""
        return text if token == self._token else ""


@contextmanager
def forward_sigterm(run_dir: Path, token: str) -> Generator[None]:
    """Turn SIGTERM to the driver into a stop request to the workers while the block runs."""
    file = run_dir / STOP_FILE
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restore = _on_sigterm(lambda text: file.write_text(f"{token}\nthe driver, {text}"))
    try:
        yield
    finally:
        restore()
        file.unlink(missing_ok=True)
