"""One live clip: its row of the network, its decoders, its muxer, its transcript and its events.

Not thread-safe: the engine calls it under its lock, except ``prepare`` and ``finish``, which its worker alone calls.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch

from mfcore.types import Condition
from preprocessing.media.live_muxer import LiveMuxer, MuxerState
from preprocessing.records import Word
from workflows.serving.batching import ClipRow
from workflows.serving.talker import ClipDecoder, Latents, Talker
from workflows.serving.transcript import ScheduledWords


@dataclass(frozen=True, kw_only=True)
class SpokenEvent:
    """An accepted change of a clip, with the chunks in which it is active."""

    event_id: str
    first_chunk: int
    last_chunk: int
    accepted_at: float  # seconds of the monotonic clock


@dataclass(frozen=True, kw_only=True)
class MadeChunk:
    """One chunk with its fragment of the mp4."""

    chunk: int
    data: bytes
    frames: int
    samples: int
    start_seconds: float
    started: tuple[str, ...] = ()  # ids of events
    active: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    is_last: bool = False  # the rest of the streams, not a chunk


@dataclass(kw_only=True)
class Pace:
    """Position of the viewer. A session makes chunks until it is a fixed time ahead."""

    played_to: float = 0.0  # seconds
    moved_at: float = field(default_factory=time.monotonic)  # of the last progress
    acked_at: float = 0.0  # of the last acknowledgment

    def acknowledge(self, played_to: float, made: float) -> None:
        """Take the playhead of the viewer, at most the end of what is made."""
        played_to = min(max(0.0, played_to), made)
        self.acked_at = time.monotonic()
        if played_to != self.played_to:
            self.played_to, self.moved_at = played_to, self.acked_at

    def deadline(self, chunk_start: float) -> float | None:
        """Return the time of the monotonic clock at which playback reaches a chunk; None before it plays."""
        return self.acked_at + chunk_start - self.played_to if self.played_to > 0 else None


class Session:
    """A live clip between two chunks."""

    def __init__(self, talker: Talker, row: ClipRow, *, key: str, state: MuxerState | None = None) -> None:
        """Continue a row; ``key``: of its snapshots; ``state``: of the muxer of an earlier session of the clip."""
        self.talker, self.row, self.key = talker, row, key
        self.decoder: ClipDecoder = talker.decoder(row.cond)
        self.muxer = LiveMuxer(fps=talker.fps, size=talker.size, sample_rate=talker.sample_rate, state=state)
        self.words = ScheduledWords()
        self.events: list[SpokenEvent] = []
        self.pace = Pace()
        self.reserved = row.chunk  # chunks that are made or being made
        self.sent: deque[MadeChunk] = deque(maxlen=8)  # last ones, for a client that missed them
        self._changes: list[tuple[Condition, str]] = []  # condition and the part that changes

    @property
    def chunk_seconds(self) -> Fraction:
        """Return the length of a chunk."""
        return self.talker.chunk_seconds

    @property
    def made_seconds(self) -> float:
        """Return the end of the last chunk that was made."""
        return float(self.row.chunk * self.chunk_seconds)

    @property
    def next_start(self) -> float:
        """Return the start of the next chunk that a change can affect."""
        return float(self.reserved * self.chunk_seconds)

    @property
    def ahead(self) -> float:
        """Return the seconds that are made beyond the playhead."""
        return self.made_seconds - self.pace.played_to

    @property
    def num_bytes(self) -> int:
        """Return the bytes of cache, decoders and fragments."""
        decoder = sum(t.numel() * t.element_size() for t in self.decoder.state().values())
        return self.row.cache.num_bytes + decoder + sum(len(c.data) for c in self.sent)

    def say(self, words: Sequence[Word], event_id: str) -> float:
        """Append words with times from 0 and return when they begin. Raises UserInputError."""
        start, end = self.words.append(words, self.next_start)
        first = int(start / self.chunk_seconds)
        self._accept(event_id, first, max(first, int(end / self.chunk_seconds)))
        return start

    def change(self, cond: Condition, part: str, *, event_id: str, chunks: int) -> float:
        """Take ``caption`` or ``voice`` from a condition from the next chunk on; return the time of its start."""
        self._changes.append((cond, part))
        self._accept(event_id, self.reserved, self.reserved + chunks - 1)
        return self.next_start

    def _accept(self, event_id: str, first: int, last: int) -> None:
        if event_id:
            now = time.monotonic()
            self.events.append(SpokenEvent(event_id=event_id, first_chunk=first, last_chunk=last, accepted_at=now))

    def reserve(self) -> list[tuple[Condition, str]]:
        """Begin the next chunk: later changes affect the one after it. Returns the changes to apply."""
        changes, self._changes = self._changes, []
        self.reserved = self.row.chunk + 1
        first, length = self.row.chunk * self.chunk_seconds, self.chunk_seconds
        reach = self.talker.horizon
        words = self.words.within(float(first) - reach, float(first + length) + reach)
        self.words.forget_before(float(first) - reach)
        self.row.cond = self.talker.with_words(self.row.cond, words)
        return changes

    def apply(self, changes: Sequence[tuple[Condition, str]]) -> None:
        """Apply changes of caption and voice to the row."""
        for cond, part in changes:
            if part == "voice":
                self.talker.replace_voice(self.row, cond)
            else:
                self.row.cond = replace(self.row.cond, caption=cond.caption, caption_mask=cond.caption_mask)

    def finish(self, latents: Latents) -> MadeChunk:
        """Decode and mux the chunk that the row has just made."""
        chunk = self.row.chunk - 1
        signals = self.decoder.push(latents)
        return MadeChunk(
            chunk=chunk,
            data=self.muxer.push(signals.frames, signals.samples),
            frames=0 if signals.frames is None else len(signals.frames),
            samples=0 if signals.samples is None else len(signals.samples),
            start_seconds=float(chunk * self.chunk_seconds),
        )

    def mark_events(self, made: MadeChunk) -> tuple[MadeChunk, list[SpokenEvent]]:
        """Return the chunk with its events, and the events that start in it; completed ones are removed."""
        started = [e for e in self.events if e.first_chunk == made.chunk]
        active = [e for e in self.events if e.first_chunk <= made.chunk <= e.last_chunk]
        completed = [e for e in self.events if e.last_chunk <= made.chunk]
        self.events = [e for e in self.events if e.last_chunk > made.chunk]
        marked = replace(
            made,
            started=tuple(e.event_id for e in started),
            active=tuple(e.event_id for e in active),
            completed=tuple(e.event_id for e in completed),
        )
        self.sent.append(marked)
        return marked, started

    def close(self) -> MadeChunk:
        """End the streams and return the rest of the clip."""
        signals = self.decoder.flush(self.row.chunk)
        data = self.muxer.push(signals.frames, signals.samples) + self.muxer.close()
        return MadeChunk(
            chunk=self.row.chunk - 1,
            data=data,
            frames=0,
            samples=0 if signals.samples is None else len(signals.samples),
            start_seconds=self.made_seconds,
            is_last=True,
        )

    def move(self, device: torch.device) -> None:
        """Move cache and conditions to a device, such as the CPU while nobody watches."""
        self.row.cache = self.row.cache.to(device)
        self.row.cond = self.row.cond.to(device)
