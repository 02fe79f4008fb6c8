"""Lease of a dataset or run: one driver at a time, recorded with a fencing token.

``_lock`` contains the lease of the first driver. A driver that takes over from token T creates ``_lock-T`` with its own
lease, so of several takers exactly one succeeds. The last lease of this chain is valid. Nobody but its holder writes a
lease, and renewal never creates a file, so a paused holder cannot return. Release removes ``_lock`` first: without it,
no lease is valid.

A driver is dead if its process has ended on this machine, or if its lease expired on the monotonic clock of this boot.
Clocks of other machines are not compared: a lease of another machine is dead if it does not change for its full
duration. Workers verify the token just before they publish a file.
"""

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.processes import process_start_time
from preprocessing.io.storage import Store

LOCK = "_lock"
LEASE_SECONDS = 60.0
_CHECKS = 20  # of a lease of another machine, per duration
_ATTEMPTS = 3  # of a write that races with a late write of an earlier driver


class LeaseLostError(InfrastructureError):
    """The lease belongs to another driver or to none."""


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """A lease as stored."""

    name: str  # of its file
    raw: bytes
    values: dict[str, Any]  # empty if the file does not parse

    @property
    def token(self) -> str:
        """Return the token; for a damaged file, a digest of its content."""
        return self.values.get("token") or hashlib.sha256(self.raw).hexdigest()[:16]

    @property
    def successor(self) -> str:
        """Return the file name of the lease that takes over from this one."""
        return f"{LOCK}-{self.token}"


def read_lease(store: Store) -> LeaseRecord | None:
    """Return the valid lease of a store; None without one."""
    found, name = None, LOCK
    read = set[str]()  # a chain that leads back to itself is damaged
    with suppress(FileNotFoundError, NotADirectoryError):
        while name not in read:
            read.add(name)
            raw = store.read(name)
            found = LeaseRecord(name=name, raw=raw, values=_parse(raw))
            name = found.successor
    return found


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        values = json.loads(raw)
    except ValueError:
        return {}
    wanted = {"token": str, "host": str, "pid": int, "expires": float}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), kind) for key, kind in wanted.items()):
        return {}
    return {"seconds": LEASE_SECONDS, "boot": "", **values} if values["token"].isalnum() else {}


def verify_lease(store: Store, token: str) -> None:
    """Raise LeaseLostError unless `token` holds the lease of the store."""
    lease = read_lease(store)
    if lease is None:
        raise LeaseLostError(
            f"{store.uri} has no {LOCK}: was the dataset emptied or removed? Run the same command again to resume"
        )
    if lease.token != token:
        raise LeaseLostError(f"{store.uri} is owned by another driver. This driver stops without writing")


def write_fenced(store: Store, token: str, name: str, data: bytes) -> None:
    """Write a file as the holder of the lease.

    Raise LeaseLostError, with the old file unchanged, if the lease is lost before the file is published. Locally the
    next driver deletes the temporary file of a paused writer. In S3, the write fails if the file has changed.
    """
    _publish_fenced(store, token, partial(store.write, name, data))


def upload_fenced(store: Store, token: str, local: Path, name: str) -> None:
    """Copy a local file into the store as the holder of the lease; see `write_fenced`."""
    _publish_fenced(store, token, partial(store.upload, local, name))


def remove_fenced(store: Store, token: str, name: str) -> None:
    """Remove a file as the holder of the lease, if it exists; see `write_fenced`."""
    _publish_fenced(store, token, partial(store.remove, name))


def _publish_fenced(store: Store, token: str, publish: Callable[..., None]) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            publish(before_publish=partial(verify_lease, store, token))
            return
        except (FileNotFoundError, FileExistsError):
            verify_lease(store, token)  # if the lease is held, a late write of the driver before came in between
            if attempt == _ATTEMPTS - 1:
                raise


class Lease:
    """Lease of a store in a ``with`` block. Raises UserInputError if a live driver holds it."""

    def __init__(self, store: Store, seconds: float = LEASE_SECONDS) -> None:
        self.token = secrets.token_hex(8)
        self._store, self._seconds = store, seconds
        self._name, self._renewals = LOCK, 0
        holder = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start_time(os.getpid()),
            "boot": _boot_id(),
            "processes": _namespace("pid"),
            "seconds": seconds,
        }
        self._fixed = json.dumps(holder)[:-1]
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        while not self._acquire():
            pass  # another driver was faster; the next attempt finds its lease
        self._renewer.start()
        return self

    def _acquire(self) -> bool:
        before = read_lease(self._store)
        if before is not None and not _is_dead(self._store, before):
            return False
        leftovers = [] if before else [name for name in self._store.list_entries() if name.startswith(f"{LOCK}-")]
        self._name = before.successor if before else LOCK
        self._store.create_exclusive(self._name, self._content())
        now = read_lease(self._store)
        if now is None or now.token != self.token:  # the earlier lease was released, or another driver was faster
            self._remove_if_own(self._name)
            return False
        for name in leftovers:  # of a chain without beginning
            self._store.remove(name)
        return True

    def _remove_if_own(self, name: str) -> None:
        with suppress(FileNotFoundError):
            if _parse(self._store.read(name)).get("token") == self.token:
                self._store.remove(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join()
        with suppress(InfrastructureError):  # must not hide an earlier error; the lease expires anyway
            lease = read_lease(self._store)
            if lease is not None and lease.token == self.token:
                names = [name for name in self._store.list_entries() if name.startswith(f"{LOCK}-")]
                for name in [LOCK, *names]:
                    self._store.remove(name)

    def _content(self) -> bytes:
        """Return the lease as JSON of constant length, so that it can be overwritten in place."""
        varying = {
            "renewals": f"{self._renewals:12d}",
            "expires": f"{time.time() + self._seconds:16.3f}",
            "deadline": f"{time.monotonic() + self._seconds:16.3f}",
        }
        return (self._fixed + "".join(f', "{key}": {value}' for key, value in varying.items()) + "}").encode()

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            with suppress(InfrastructureError, OSError):  # retried at the next interval, else the lease expires
                lease = read_lease(self._store)
                if lease is None or lease.token != self.token:
                    return  # lost: workers detect it with verify_lease
                self._renewals += 1
                self._store.replace_exclusive(self._name, lease.raw, self._content())


def _is_dead(store: Store, lease: LeaseRecord) -> bool:
    """Return True for a lease of a dead driver, False if it was released. Raise UserInputError for a live one."""
    values = lease.values
    if not values:
        print(f"warning: {store.uri}/{lease.name} is damaged and is ignored", file=sys.stderr, flush=True)
        return True
    left = values["seconds"]
    if values["boot"] == _boot_id() != "":
        local = values["host"] == socket.gethostname() and values["processes"] == _namespace("pid")
        if local and process_start_time(values["pid"]) != values["started"]:
            return True
        left = min(left, values["deadline"] - time.monotonic())
        if local and left > 0:
            raise _busy_error(store, lease)
    return left <= 0 or not _changes(store, lease, left)


def _changes(store: Store, lease: LeaseRecord, seconds: float) -> bool:
    """Watch a lease; return False if it is the same after `seconds`, True if it was released.

    Raise UserInputError once it was renewed.
    """
    where = f"{store.uri} has a lease of {_holder(lease)}"
    print(f"waiting up to {seconds:.0f} s: {where}, which may be dead", file=sys.stderr, flush=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(seconds / _CHECKS, max(0.0, end - time.monotonic())))
        now = read_lease(store)
        if now is None:
            return True
        if now.raw != lease.raw:
            raise _busy_error(store, now)
    return False


def _busy_error(store: Store, lease: LeaseRecord) -> UserInputError:
    return UserInputError(f"{store.uri} is being written by {_holder(lease)}. Wait for it, or stop it")


def _holder(lease: LeaseRecord) -> str:
    return f"process {lease.values.get('pid')} on {lease.values.get('host')}"


@cache
def _boot_id() -> str:
    """Return an id of this boot and its monotonic clock; "" where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return f"{boot} {_namespace('time')}"


@cache
def _namespace(kind: str) -> str:
    """Return the id of a namespace of this process; "" where it is unknown."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""
