"""Background threads that end with a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def background_thread(run: Callable[[threading.Event], None], *, name: str) -> Iterator[None]:
    """Call ``run(stop)`` in a daemon thread while the block runs; then set ``stop`` and join the thread."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
