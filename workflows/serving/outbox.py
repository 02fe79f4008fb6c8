"""Queue from the worker of the engine to one client; any thread may add, one reader takes."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from workflows.serving.session import MadeChunk


@dataclass(frozen=True, kw_only=True)
class ChunkNews:
    """A chunk, with measurements of its making."""

    made: MadeChunk
    made_ms: float = 0.0
    ahead_ms: float = 0.0
    deadline_missed: bool = False
    rows: int = 1  # sessions of the same forward pass
    first_chunk_ms: float | None = None  # from the start of the session, first chunk only


@dataclass(frozen=True, kw_only=True)
class SnapshotNews:
    """A snapshot was stored."""

    key: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SessionEnd:
    """The session is over: ``stopped``, ``idle``, ``left``, ``shutdown`` or ``failed``."""

    reason: str
    key: str | None  # of its snapshot
    seconds: float


News = ChunkNews | SnapshotNews | SessionEnd


class Outbox:
    """Unread news of a session. The engine makes no chunk while too many are unread."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        """Call ``wake`` after each addition, in the thread that adds."""
        self._news: deque[News] = deque()
        self._wake = wake

    def put(self, news: News) -> None:
        """Add news."""
        self._news.append(news)
        self._wake()

    def take(self) -> News | None:
        """Return and remove the oldest news, None without any."""
        try:
            return self._news.popleft()
        except IndexError:
            return None

    def __len__(self) -> int:
        return len(self._news)


class AsyncOutbox(Outbox):
    """Outbox with an asynchronous reader. Must be created in the event loop of the reader."""

    def __init__(self) -> None:
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()
        super().__init__(self._notify)

    def _notify(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._filled.set)

    async def get(self) -> News:
        """Return the oldest news; waits for it."""
        while (news := self.take()) is None:
            self._filled.clear()
            if (news := self.take()) is not None:
                return news
            await self._filled.wait()
        return news
