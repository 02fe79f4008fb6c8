"""Prefetch: a thread produces the next items while the caller works on the current one."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _BoundedQueue(Generic[T]):
    """Queue with a limit in bytes between the producer thread and the consumer."""

    def __init__(self, size: Callable[[T], int], max_bytes: int) -> None:
        self._size, self._max_bytes = size, max_bytes
        self._items: deque[T] = deque()
        self._bytes = 0
        self._stopped = self._ended = False
        self._changed = threading.Condition()

    def put(self, item: T) -> bool:
        """Wait for room, then add the item. Return False if the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._items or self._bytes < self._max_bytes)
            if not self._stopped:
                self._items.append(item)
                self._bytes += self._size(item)
            self._changed.notify_all()
            return not self._stopped

    def take(self) -> Generator[T]:
        """Yield items until the producer has ended."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._items) or self._ended)
                if not self._items:
                    return
                item = self._items.popleft()
                self._bytes -= self._size(item)
                self._changed.notify_all()
            yield item

    def end(self) -> None:
        """Mark the end of the items; called by the producer."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Release a producer that waits for room; called by the consumer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def prefetch(items: Generator[T], size: Callable[[T], int], max_bytes: int) -> Generator[T]:
    """Yield the same items in the same order, produced by another thread.

    An exception of `items` is raised after the items before it. If the caller stops early, `items` is closed before
    this generator returns.

    Args:
        items: Producer, run in the other thread.
        size: Returns the bytes of an item.
        max_bytes: The producer pauses while waiting items have so many bytes; one item may always wait.
    """
    queue: _BoundedQueue[T] = _BoundedQueue(size, max_bytes)
    failure: list[BaseException] = []

    def produce() -> None:
        try:
            for item in items:
                if not queue.put(item):
                    break
        except BaseException as error:  # raised again in the consumer's thread
            failure.append(error)
        finally:
            items.close()
            queue.end()

    producer = threading.Thread(target=produce, name="prefetch", daemon=True)
    producer.start()
    try:
        yield from queue.take()
    finally:
        queue.stop()
        producer.join()
    if failure:
        raise failure[0]


def group_consecutive(items: Iterator[T], key: Callable[[T], object], max_items: int) -> Generator[list[T]]:
    """Yield groups of up to `max_items` consecutive items with equal keys."""
    group: list[T] = []
    for item in items:
        if group and (len(group) == max_items or key(item) != key(group[0])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
