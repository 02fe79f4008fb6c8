"""Access to a server: token, origin, and rate of messages."""

import hmac
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

OPEN_PATHS = ("/", "/healthz", "/readyz")
OPEN_PREFIX = "/page/"
_MESSAGES, _PERIOD = 40.0, 2.0  # a client may send so many messages in so many seconds


class AccessPolicy:
    """Who may use a server."""

    def __init__(self, token: str | None, origins: tuple[str, ...] = ()) -> None:
        """Require ``token`` unless None; ``origins`` are accepted in addition to that of the server."""
        self.token, self.origins = token, origins

    def allows_token(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> bool:
        """Return True if a request needs no token or has it."""
        if self.token is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return True
        given = query.get("token") or headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.token.encode())

    def allows_origin(self, headers: Mapping[str, str]) -> bool:
        """Return True for a request of a program, which has no Origin, or of a page of this server."""
        origin = headers.get("origin")
        if origin is None or origin in self.origins:
            return True
        return urlsplit(origin).netloc == headers.get("host", "")


class MessageRate:
    """Number of messages of one client, refilled with time."""

    def __init__(self, messages: float = _MESSAGES, period: float = _PERIOD) -> None:
        self._most, self._per_second = messages, messages / period
        self._left, self._at = messages, time.monotonic()

    def allow(self) -> bool:
        """Count a message; return False if it is one too many."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
