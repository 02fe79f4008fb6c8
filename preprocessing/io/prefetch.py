"""Making and using side by side: a thread makes the next items while the caller works on the last ones."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Line(Generic[T]):
    """Items between the thread that makes them and the one that takes them."""

    def __init__(self, size: Callable[[T], int], most: int) -> None:
        self._size, self._most = size, most
        self._waiting: deque[T] = deque()
        self._bytes = 0
        self._stopped = self._ended = False
        self._turn = threading.Condition()

    def put(self, item: T) -> bool:
        """Wait for room, then add; False when nobody takes any more."""
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or not self._waiting or self._bytes < self._most)
            if not self._stopped:
                self._waiting.append(item)
                self._bytes += self._size(item)
            self._turn.notify_all()
            return not self._stopped

    def take(self) -> Generator[T]:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: bool(self._waiting) or self._ended)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._bytes -= self._size(item)
                self._turn.notify_all()
            yield item

    def end(self) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify_all()

    def stop(self) -> None:
        with self._turn:
            self._stopped = True
            self._turn.notify_all()


def prefetch(items: Generator[T], size: Callable[[T], int], most: int) -> Generator[T]:
    """The same items in the same order, made by another thread while those that wait are smaller than ``most``.

    ``size`` gives bytes; one item may always wait. An exception of ``items`` is raised here, behind the items before
    it. When the caller stops early, ``items`` is closed before this returns.
    """
    line: _Line[T] = _Line(size, most)
    failure: list[BaseException] = []

    def make() -> None:
        try:
            for item in items:
                if not line.put(item):
                    break
        except BaseException as error:  # raised again in the thread that asked
            failure.append(error)
        finally:
            items.close()
            line.end()

    maker = threading.Thread(target=make, name="ahead", daemon=True)
    maker.start()
    try:
        yield from line.take()
    finally:
        line.stop()
        maker.join()
    if failure:
        raise failure[0]


def group_consecutive(items: Iterator[T], key: Callable[[T], object], most: int) -> Generator[list[T]]:
    """Up to ``most`` items that follow each other and have one key."""
    run: list[T] = []
    for item in items:
        if run and (len(run) == most or key(item) != key(run[0])):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
