"""A word that the run is to end soon: a preemption notice, a signal to one of its processes, or to the driver.

Ranks hear of it at the next step boundary, agree, save and end. A second SIGTERM ends a process as usual.
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
"""File in the run's folder, with the driver's token, by which a driver passes a notice on to its workers."""
POLL_S = 1.0  # seconds between looks at what takes a file system or a call

_received: list[str] = []
_ears: list[socket.socket] = []  # both ends of the pair that signals come in by


def install_sigterm_handler() -> None:
    """Take SIGTERM as a notice from now on; only the main thread may ask for it (elsewhere nothing happens)."""
    if threading.current_thread() is not threading.main_thread():
        return
    _received.clear()
    _on_sigterm(_received.append)
    _hear_at_once(_received.append)


def _hear_at_once(tell: Callable[[str], object]) -> None:
    """Tell of a SIGTERM from a thread as well.

    Python's handlers wait until the main thread runs Python. That of a Ray worker is in native code between calls, and
    on a busy machine a run may end before the next one. What the process itself writes to a socket is there at once.
    """
    if _ears:
        return
    inner, outer = socket.socketpair()
    outer.setblocking(False)
    if (taken := signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False)) != -1:
        signal.set_wakeup_fd(taken)  # an event loop's, which then runs Python often enough
        return
    _ears.extend((inner, outer))

    def read() -> None:
        while numbers := inner.recv(16):
            if signal.SIGTERM in numbers:
                tell(_word())

    threading.Thread(target=read, name="notice", daemon=True).start()


def _word() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} received SIGTERM"


def _on_sigterm(tell: Callable[[str], object]) -> Callable[[], object]:
    """Tell of the first SIGTERM; a second one does what it did before. Returns what puts that back."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def back() -> None:
        signal.signal(signal.SIGTERM, before)

    def receive(number: int, frame: FrameType | None) -> None:
        del number, frame
        tell(_word())
        back()

    signal.signal(signal.SIGTERM, receive)
    return back


class PreemptionMonitor:
    """What one rank knows. ``outside``: asked every second as well, for example Ray's preemption watcher."""

    def __init__(self, run_dir: Path, token: str, outside: Callable[[], str] = lambda: "") -> None:
        self._file, self._token, self._outside = run_dir / STOP_FILE, token, outside
        self._looked, self._heard = 0.0, ""

    def __call__(self) -> str:
        """Why this rank is to stop, "" while it is not."""
        if _received:
            return _received[0]
        if not self._heard and time.monotonic() - self._looked > POLL_S:
            self._looked = time.monotonic()
            self._heard = self._outside() or self._from_driver()
        return self._heard

    def _from_driver(self) -> str:
        try:
            token, _, text = self._file.read_text().partition("\n")
        except OSError:
            return ""
        return text if token == self._token else ""


@contextmanager
def forward_sigterm(run_dir: Path, token: str) -> Generator[None]:
    """In the driver: while the block runs, SIGTERM tells the workers to save and end."""
    file = run_dir / STOP_FILE
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    back = _on_sigterm(lambda text: file.write_text(f"{token}\nthe driver, {text}"))
    try:
        yield
    finally:
        back()
        file.unlink(missing_ok=True)
