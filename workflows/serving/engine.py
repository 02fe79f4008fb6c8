"""Engine: one worker thread that makes the chunks of all sessions, those of equal age in one forward pass.

The worker takes the session with the least seconds ahead of its viewer, and every other session that wants a
chunk and may share its pass. While a pass runs, more sessions come to want one, so passes fill as the load grows.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from math import ceil

import torch

from mfcore.types import Condition
from preprocessing.records import Word
from workflows.serving.appearance import default_condition
from workflows.serving.metrics import ServingMetrics
from workflows.serving.outbox import ChunkNews, Outbox, SessionEnd, SnapshotNews
from workflows.serving.session import MadeChunk, Session
from workflows.serving.snapshots import SnapshotStore, new_key, pack_session
from workflows.serving.talker import Talker

_LOGGER = logging.getLogger(__name__)
_ENCODER_BYTES = 8_000_000  # of the two encoders of a session, estimated
_HOUSEKEEPING_S = 1.0
_WRITERS = 4  # threads that store snapshots of running sessions
_UNREAD = 4  # news of a client before its session pauses
_CPU = torch.device("cpu")
WARM_UP_TEXT = "Hello."


class ServerFullError(Exception):
    """No place for another session."""

    def __init__(self, capacity: int, active: int, retry_after: float) -> None:
        super().__init__(f"all {capacity} places are taken: try again in {retry_after:.0f} s")
        self.capacity, self.active, self.retry_after = capacity, active, retry_after


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of an engine."""

    sessions: int = 4
    memory_bytes: int | None = None  # of all sessions; None: no limit
    chunks_ahead: int = 2  # beyond the playhead of the viewer
    park_seconds: float = 10.0  # without progress before the cache leaves the GPU
    idle_seconds: float = 60.0  # without progress before the session ends
    retry_seconds: float = 5.0  # to try again when full
    snapshot_seconds: float | None = None  # between snapshots of a running session; None: only when it ends


@dataclass(kw_only=True)
class Place:
    """A session with its client. Mutable, under the lock of the engine."""

    session: Session
    outbox: Outbox
    opened_at: float  # seconds of the monotonic clock
    chunk_limit: int | None = None  # the session stops after this many chunks
    first_chunk_ms: float | None = None
    busy: bool = False  # in a pass
    parked: bool = False
    want_snapshot: bool = False
    stop: str | None = None  # reason
    wanted_since: float = field(default_factory=time.monotonic)
    last_chunk_at: float | None = None
    stored_at: float | None = None  # of the last snapshot, in seconds of the monotonic clock
    storing: Future[None] | None = None


class ServingEngine:
    """Sessions of one network."""

    def __init__(self, talker: Talker, *, limits: EngineLimits, snapshots: SnapshotStore) -> None:
        self.talker, self.limits, self.snapshots = talker, limits, snapshots
        self.metrics = ServingMetrics()
        self.ready = threading.Event()  # after a successful warm-up
        self.warmed_up = threading.Event()  # after any
        self.session_bytes = _ENCODER_BYTES  # of one session with a full cache; measured by the warm-up
        self._places: dict[str, Place] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._encoders = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="encoder")
        self._writers = ThreadPoolExecutor(max_workers=_WRITERS, thread_name_prefix="snapshots")
        self._worker = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the worker; ``ready`` is set after the warm-up."""
        self._worker.start()

    @property
    def is_running(self) -> bool:
        """Return True while the worker makes chunks."""
        return self._worker.is_alive()

    @property
    def capacity(self) -> int:
        """Return the number of sessions that fit."""
        by_bytes = None if self.limits.memory_bytes is None else self.limits.memory_bytes // self.session_bytes
        return self.limits.sessions if by_bytes is None else min(self.limits.sessions, max(1, by_bytes))

    @property
    def active(self) -> int:
        """Return the number of sessions."""
        return len(self._places)

    def check_place(self) -> None:
        """Raise ServerFullError without a place."""
        if self.active >= self.capacity or self._stopping:
            raise ServerFullError(self.capacity, self.active, self.limits.retry_seconds)

    def open(
        self,
        session: Session,
        outbox: Outbox,
        *,
        name: str,
        opened_at: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Serve a session under a name, until it has ``seconds`` if given. Raises ServerFullError."""
        with self._changed:
            self.check_place()
            assert name not in self._places
            self._places[name] = Place(
                session=session,
                outbox=outbox,
                opened_at=opened_at or time.monotonic(),
                chunk_limit=None if seconds is None else ceil(seconds / self.talker.chunk_seconds),
            )
            self._report()
            self._changed.notify()

    def acknowledge(self, name: str, played_to: float) -> None:
        """Take the playhead of a viewer."""
        with self._changed:
            if place := self._places.get(name):
                place.session.pace.acknowledge(played_to, place.session.made_seconds)
                self._note_wants(place)
                self._changed.notify()

    def say(self, name: str, words: Sequence[Word], event_id: str) -> float | None:
        """Append words and return the time at which they begin; None without the session. Raises UserInputError."""
        return self._with_session(name, lambda session: session.say(words, event_id))

    def change(self, name: str, cond: Condition, part: str, *, event_id: str, chunks: int) -> float | None:
        """Change caption or voice and return the time at which it applies; None without the session."""
        return self._with_session(name, lambda session: session.change(cond, part, event_id=event_id, chunks=chunks))

    def _with_session(self, name: str, function: Callable[[Session], float]) -> float | None:
        with self._changed:
            place = self._places.get(name)
            if place is None:
                return None
            place.session.pace.moved_at = time.monotonic()
            return function(place.session)

    def request_snapshot(self, name: str) -> None:
        """Store a snapshot after the current chunk; the outbox reports it."""
        with self._changed:
            if place := self._places.get(name):
                place.want_snapshot = True
                self._changed.notify()

    def stop(self, name: str, reason: str = "stopped") -> None:
        """End a session after the current chunk; all reasons but ``stopped`` and ``failed`` store a snapshot."""
        with self._changed:
            if place := self._places.get(name):
                place.stop = place.stop or reason
                self._changed.notify()

    def shutdown(self, timeout: float) -> None:
        """End all sessions with snapshots and stop the worker, within ``timeout`` seconds."""
        with self._changed:
            self._stopping = True
            for place in self._places.values():
                place.stop = place.stop or "shutdown"
            self._changed.notify()
        if self._worker.is_alive():
            self._worker.join(timeout)

    # worker

    def _run(self) -> None:
        with self._encoders, self._writers:
            self._warm_up()
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._expire()
                ended = [(name, p) for name, p in self._places.items() if p.stop or p.want_snapshot]
                group = [] if ended else self._next_group()
                if not ended and not group:
                    if self._stopping:
                        return
                    self._changed.wait(_HOUSEKEEPING_S)
                    continue
                changes = {id(p): p.session.reserve() for p in group}
            for name, place in ended:
                self._settle(name, place)
            if group:
                self._make_chunks(group, changes)

    def _warm_up(self) -> None:
        try:
            self.session_bytes = warm_up(self.talker) + _ENCODER_BYTES
        except Exception:
            _LOGGER.exception("the warm-up failed")
        else:
            self.ready.set()
        self.warmed_up.set()

    def _expire(self) -> None:
        """End sessions without progress, and move their caches to the CPU before."""
        now = time.monotonic()
        for place in self._places.values():
            still = now - place.session.pace.moved_at
            if still > self.limits.idle_seconds:
                place.stop = place.stop or "idle"
            elif still > self.limits.park_seconds and not place.parked and self.talker.device.type != "cpu":
                place.session.move(_CPU)
                place.parked = True

    def _wants_chunk(self, place: Place) -> bool:
        if place.chunk_limit is not None and place.session.row.chunk >= place.chunk_limit:
            place.stop = place.stop or "stopped"
            return False
        limit = self.limits.chunks_ahead * float(self.talker.chunk_seconds)
        return place.session.ahead < limit - 1e-6 and len(place.outbox) < _UNREAD

    def _note_wants(self, place: Place) -> None:
        if not self._wants_chunk(place):
            place.wanted_since = time.monotonic()

    def _next_group(self) -> list[Place]:
        """Return the sessions of the next pass: the most urgent one and those that may share its pass."""
        waiting = [place for place in self._places.values() if self._wants_chunk(place)]
        if not waiting:
            return []
        first = min(waiting, key=lambda place: place.session.ahead)
        key = self.talker.batch_key(first.session.row)
        return [place for place in waiting if self.talker.batch_key(place.session.row) == key]

    def _make_chunks(self, group: Sequence[Place], changes: dict[int, list[tuple[Condition, str]]]) -> None:
        begin = time.perf_counter()
        try:
            for place in group:
                if place.parked:
                    place.session.move(self.talker.device)
                    place.parked = False
                place.session.apply(changes[id(place)])
            latents = self.talker.advance([place.session.row for place in group])
        except Exception:
            _LOGGER.exception("a pass of %d sessions failed", len(group))
            self._fail(group)
            return
        # Decoders and encoders of different sessions run at once: they release the interpreter lock.
        jobs = {
            self._encoders.submit(place.session.finish, made): place for place, made in zip(group, latents, strict=True)
        }
        for job in as_completed(jobs):
            place = jobs[job]
            try:
                chunk = job.result()
            except Exception:
                _LOGGER.exception("a chunk cannot be encoded")
                self._fail([place])
                continue
            with self._changed:
                self._deliver(place, chunk, rows=len(group), made_ms=1e3 * (time.perf_counter() - begin))
        for place in group:
            self._store_regularly(place)

    def _deliver(self, place: Place, made: MadeChunk, *, rows: int, made_ms: float) -> None:
        now, session = time.monotonic(), place.session
        marked, started = session.mark_events(made)
        for event in started:
            self.metrics.event_applied.observe(now - event.accepted_at if event.accepted_at else 0.0)
        first = None
        if place.first_chunk_ms is None:
            first = place.first_chunk_ms = 1e3 * (now - place.opened_at)
            self.metrics.first_chunk.observe(first / 1e3)
        elif place.last_chunk_at is not None:
            self.metrics.chunk_period.observe(now - place.last_chunk_at)
        place.last_chunk_at = now
        deadline = session.pace.deadline(marked.start_seconds)
        missed = deadline is not None and now > deadline
        self.metrics.missed_deadlines.inc(int(missed))
        self.metrics.chunks_ahead.observe(session.ahead / float(self.talker.chunk_seconds))
        self.metrics.rows.observe(rows)
        place.outbox.put(
            ChunkNews(
                made=marked,
                made_ms=made_ms,
                ahead_ms=1e3 * session.ahead,
                deadline_missed=missed,
                rows=rows,
                first_chunk_ms=first,
            )
        )

    def _settle(self, name: str, place: Place) -> None:
        """Store the snapshots of a session, and end it if requested."""
        session, reason, key = place.session, place.stop, None
        try:
            if place.storing is not None:
                wait([place.storing])  # an older state must not replace a newer one
            if place.want_snapshot:
                place.want_snapshot = False
                self._store_snapshot(session, own_key := new_key())
                place.outbox.put(SnapshotNews(key=own_key, seconds=session.made_seconds))
            if reason in ("idle", "shutdown", "left"):
                self._store_snapshot(session, session.key)
                key = session.key
            elif reason == "stopped":
                place.outbox.put(ChunkNews(made=session.close()))
                if place.storing is not None:
                    self.snapshots.remove(session.key)
        except Exception:
            _LOGGER.exception("a session cannot be stored or ended")
            reason = reason and "failed"
        if reason is not None:
            with self._changed:
                self._places.pop(name, None)
                self._report()
            place.outbox.put(SessionEnd(reason=reason, key=key, seconds=session.made_seconds))

    def _store_snapshot(self, session: Session, key: str) -> None:
        self.snapshots.write(key, self._pack(session))

    def _pack(self, session: Session) -> bytes:
        with self._changed:
            changes = session.reserve()
            session.reserved = session.row.chunk  # no chunk begins
        session.apply(changes)
        return pack_session(session)

    def _store_regularly(self, place: Place) -> None:
        """Begin to store the state of a running session if its last snapshot is too old."""
        every, now = self.limits.snapshot_seconds, time.monotonic()
        if every is None or place.stop or (place.stored_at is not None and now - place.stored_at < every):
            return
        if place.storing is None or place.storing.done():
            place.stored_at = now
            place.storing = self._writers.submit(self._write_state, place.session.key, self._pack(place.session))

    def _write_state(self, key: str, data: bytes) -> None:
        try:
            self.snapshots.write(key, data)
        except Exception:
            _LOGGER.exception("the state of a running session cannot be stored")

    def _fail(self, places: Sequence[Place]) -> None:
        with self._changed:
            for place in places:
                place.stop = "failed"

    def _report(self) -> None:
        self.metrics.sessions.set(len(self._places))
        self.metrics.session_bytes.set(self.session_bytes)


def warm_up(talker: Talker) -> int:
    """Make chunks until the cache of a session is full, and return the bytes of that session."""
    session = Session(talker, talker.start_row(default_condition(talker), seed=0), key="")
    session.say(talker.timed_words(WARM_UP_TEXT), "")
    for _ in range(talker.window_chunks + 1):
        session.apply(session.reserve())
        session.mark_events(session.finish(talker.advance([session.row])[0]))
    session.close()
    return session.num_bytes
