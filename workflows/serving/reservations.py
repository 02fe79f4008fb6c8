"""Sessions of ``POST /v1/sessions`` that nobody has opened yet, stored as snapshots that any replica can open."""

import time

from mfcore.errors import UserInputError
from workflows.serving.engine import ServerFullError
from workflows.serving.service import RequestRefusedError, SessionService
from workflows.serving.session import Session
from workflows.serving.snapshots import new_key, pack_session, packed_at, unpack_session

RESERVED_SECONDS = 60.0
MAX_RESERVED = 16  # of one server


class Reservations:
    """Reserved sessions of one server; ``take`` also finds those of other servers with the same snapshots."""

    def __init__(self, service: SessionService) -> None:
        self._service, self._store = service, service.engine.snapshots
        self._made: dict[str, float] = {}  # name to its time in seconds of the monotonic clock

    def add(self, session: Session) -> str:
        """Keep a session for ``RESERVED_SECONDS`` and return its name. Raises ServerFullError."""
        self._drop_old()
        if len(self._made) >= MAX_RESERVED:
            self._made = {name: at for name, at in self._made.items() if self._store.exists(name)}
        if len(self._made) >= MAX_RESERVED:
            engine = self._service.engine
            raise ServerFullError(engine.capacity, engine.active, engine.limits.retry_seconds)
        name = new_key()
        self._store.write(name, pack_session(session))
        self._made[name] = time.monotonic()
        return name

    def take(self, name: str) -> Session:
        """Return and remove a session. Raises RequestRefusedError if there is none."""
        self._drop_old()
        try:
            data = self._store.read(name)
            if time.time() - packed_at(data) > RESERVED_SECONDS:
                raise UserInputError("expired")
            session = unpack_session(data, self._service.talker, keep_key=True)
        except UserInputError:
            raise RequestRefusedError(
                "unknown_session", "there is no such session, or it was opened or expired: create a new one"
            ) from None
        self._made.pop(name, None)
        self._store.remove(name)
        return session

    def _drop_old(self) -> None:
        now = time.monotonic()
        for name, at in list(self._made.items()):
            if now - at > RESERVED_SECONDS:
                del self._made[name]
                self._store.remove(name)
