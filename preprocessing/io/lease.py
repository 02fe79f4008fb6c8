"""One driver per dataset: a lease in ``_lock`` with a fencing token that workers check before they publish.

A driver that dies stops renewing, and its lease runs out; on the machine where it ran it is known to be dead at once.
Whoever takes over writes a new token, so a worker of the dead driver that wakes up late finds another token and writes
nothing.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from preprocessing.io.errors import InfrastructureError
from preprocessing.io.processes import process_start_time
from preprocessing.io.storage import Store

LOCK = "_lock"
LEASE_SECONDS = 60.0


class LeaseLostError(InfrastructureError):
    """Another driver owns the dataset now, or nobody does."""


def verify_lease(store: Store, token: str) -> None:
    """LeaseLost unless ``token`` still owns the store."""
    if not (held := _read(store)):
        raise LeaseLostError(f"{store.uri} has lost its {LOCK}: was it emptied or removed? Run the same command again")
    if held.get("token") != token:
        raise LeaseLostError(f"{store.uri} is owned by another driver now: this one stops without writing")


class Lease:
    """Hold a store for the length of a ``with`` block. ValueError when another living driver holds it."""

    def __init__(self, store: Store, seconds: float = LEASE_SECONDS) -> None:
        self.token = secrets.token_hex(8)
        self._store, self._seconds = store, seconds
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        if not self._store.create_exclusive(LOCK, self._content()):
            held = _read(self._store)
            if (holder := _alive(held)) is not None:
                raise ValueError(
                    f"{self._store.uri} is being written by {holder}: wait for it, or stop it and try again"
                )
            self._store.remove(LOCK)
            if not self._store.create_exclusive(LOCK, self._content()):
                raise ValueError(f"{self._store.uri}: another driver took over a moment ago: try again later")
        self._renewer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join()
        with suppress(InfrastructureError):  # else it would hide what went wrong before; the lease runs out by itself
            if _read(self._store).get("token") == self.token:
                self._store.remove(LOCK)

    def _content(self) -> bytes:
        return json.dumps(
            {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": process_start_time(os.getpid()),
                "expires": time.time() + self._seconds,
            }
        ).encode()

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            with suppress(InfrastructureError, OSError):  # the next time, perhaps; if never, the lease runs out
                if _read(self._store).get("token") != self.token:
                    return  # lost: the workers find out by themselves
                self._store.write(LOCK, self._content())


def _read(store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.read(LOCK))
    except FileNotFoundError:
        return {}


def _alive(held: dict[str, Any]) -> str | None:
    """Who holds the lease, or None when it is free, expired, or its process on this machine is gone."""
    if not held or held["expires"] < time.time():
        return None
    if held["host"] == socket.gethostname() and process_start_time(held["pid"]) != held["started"]:
        return None
    return f"process {held['pid']} on {held['host']} (lease for another {held['expires'] - time.time():.0f} s)"
