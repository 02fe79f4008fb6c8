"""Lease of a dataset: one driver at a time, recorded in ``_lock`` with a fencing token.

A dead driver stops renewing and its lease expires. On the machine where it ran, its death is detected at once. The next
driver writes a new token. Workers verify it before they publish, so a late worker of a dead driver writes nothing.
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

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.processes import process_start_time
from preprocessing.io.storage import Store

LOCK = "_lock"
LEASE_SECONDS = 60.0


class LeaseLostError(InfrastructureError):
    """The lease belongs to another driver or to none."""


def verify_lease(store: Store, token: str) -> None:
    """Raise LeaseLostError unless `token` holds the lease of the store."""
    lease = _read(store)
    if not lease:
        raise LeaseLostError(
            f"{store.uri} has no {LOCK}: was the dataset emptied or removed? Run the same command again to resume"
        )
    if lease.get("token") != token:
        raise LeaseLostError(f"{store.uri} is owned by another driver. This driver stops without writing")


class Lease:
    """Lease of a store in a ``with`` block. Raises ValueError if a live driver holds it."""

    def __init__(self, store: Store, seconds: float = LEASE_SECONDS) -> None:
        self.token = secrets.token_hex(8)
        self._store, self._seconds = store, seconds
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        if not self._store.create_exclusive(LOCK, self._content()):
            holder = _live_holder(_read(self._store))
            if holder is not None:
                raise UserInputError(f"{self._store.uri} is being written by {holder}. Wait for it, or stop it")
            self._store.remove(LOCK)
            if not self._store.create_exclusive(LOCK, self._content()):
                raise UserInputError(f"{self._store.uri}: another driver took the lease just now. Try again later")
        self._renewer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join()
        with suppress(InfrastructureError):  # must not hide an earlier error; the lease expires anyway
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
            with suppress(InfrastructureError, OSError):  # retried at the next interval, else the lease expires
                if _read(self._store).get("token") != self.token:
                    return  # lost: workers detect it with verify_lease
                self._store.write(LOCK, self._content())


def _read(store: Store) -> dict[str, Any]:
    try:
        return json.loads(store.read(LOCK))
    except FileNotFoundError:
        return {}


def _live_holder(lease: dict[str, Any]) -> str | None:
    """Describe the holder of a lease; None if free, expired or of a dead local process."""
    if not lease or lease["expires"] < time.time():
        return None
    if lease["host"] == socket.gethostname() and process_start_time(lease["pid"]) != lease["started"]:
        return None
    return f"process {lease['pid']} on {lease['host']} (lease for another {lease['expires'] - time.time():.0f} s)"
