"""Access to a server: token, origin, and rate of messages."""

import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

OPEN_PATHS = ("/", "/healthz", "/readyz")
OPEN_PREFIX = "/page/"
BURST_SECONDS = 2.0  # of messages that a client may send at once


class AccessPolicy:
    """Who may use a server."""

    def __init__(self, token: str | None, *, messages_per_second: float) -> None:
        """Require ``token`` unless None; limit the messages of each WebSocket."""
        self.token, self.messages_per_second = token, messages_per_second

    def allows_token(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> bool:
        """Return True if a request needs no token or has it."""
        if self.token is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return True
        given = query.get("token") or headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.token.encode())

    def allows_origin(self, headers: Mapping[str, str]) -> bool:
        """Return True for a request of a program, which has no Origin, or of a page of this server."""
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == headers.get("host", "")


class MessageRate:
    """Number of messages of one client, refilled with time."""

    def __init__(self, per_second: float) -> None:
        self._most, self._per_second = per_second * BURST_SECONDS, per_second
        self._left, self._at = self._most, time.monotonic()

    def allow(self) -> bool:
        """Count a message; return False if it is one too many."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
