"""Snapshots of sessions: one safetensors file each, with facts as JSON in its header. Nothing is executed on reading.

A snapshot holds what the next chunk depends on, and the last fragments for a client that missed them. Its key is
random: a client with the key may continue the clip.
"""

import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.model.kv_cache import KeyValue, LayeredKVCache, TokenPositions
from mfcore.types import Condition
from preprocessing.io.storage import Store
from preprocessing.media.live_muxer import MuxerState
from preprocessing.records import Word
from workflows.serving.batching import ClipRow
from workflows.serving.session import MadeChunk, Session, SpokenEvent
from workflows.serving.talker import Talker

FORMAT = 1
_KEY = re.compile(r"[0-9a-f]{32}")
_MAX_IN_MEMORY = 64
_HEADER_BYTES = 8  # of a safetensors file: length of the JSON header


def new_key() -> str:
    """Return a key that cannot be guessed."""
    return secrets.token_hex(16)


class SnapshotStore:
    """Snapshots by key, in a folder, under ``s3://``, or in memory without a place."""

    def __init__(self, uri: str | None) -> None:
        self.uri = uri
        self._store = None if uri is None else Store(uri)
        self._memory: OrderedDict[str, bytes] = OrderedDict()

    @property
    def shared(self) -> Store | None:
        """Return the place that other servers can read, None in memory."""
        return self._store

    def write(self, key: str, data: bytes) -> None:
        """Store a snapshot, in place of an earlier one of this key. Raises InfrastructureError."""
        if self._store is not None:
            self._store.write(_file(key), data)
            return
        self._memory[key] = data
        self._memory.move_to_end(key)
        while len(self._memory) > _MAX_IN_MEMORY:
            self._memory.popitem(last=False)

    def read(self, key: str) -> bytes:
        """Return a snapshot. Raises UserInputError if there is none of this key."""
        try:
            return self._memory[key] if self._store is None else self._store.read(_file(key))
        except (KeyError, FileNotFoundError):
            raise UserInputError(f"no snapshot has the key {key!r}: use a key of this server") from None

    def remove(self, key: str) -> None:
        """Delete a snapshot, if it exists. Raises InfrastructureError."""
        if self._store is None:
            self._memory.pop(key, None)
        else:
            self._store.remove(_file(key))

    def exists(self, key: str) -> bool:
        """Return True if there is a snapshot of this key. Raises InfrastructureError."""
        return key in self._memory if self._store is None else self._store.exists(_file(key))


def _file(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise KeyError(key)
    return f"{key}.safetensors"


def pack_session(session: Session) -> bytes:
    """Return the snapshot of a session between two chunks, without waiting changes."""
    row, muxer = session.row, session.muxer.state()
    tensors = {**_pack_cache(row.cache), **_pack_condition(row.cond)}
    tensors |= {f"decoder.{name}": part for name, part in session.decoder.state().items()}
    for name, kept in (("frames", muxer.kept_frames), ("samples", muxer.kept_samples)):
        if kept is not None:
            tensors[f"muxer.{name}"] = torch.from_numpy(kept)
    tensors["sent"] = torch.frombuffer(bytearray(b"".join(c.data for c in session.sent) or b"\0"), dtype=torch.uint8)
    facts = {
        "format": FORMAT,
        "key": session.key,
        "packed_at": time.time(),
        "network": session.talker.fingerprint,
        "chunk": row.chunk,
        "seed": row.seed,
        "words": [[w.word, w.start, w.end] for w in session.words.words],
        "words_end": session.words.end,
        "events": [[e.event_id, e.first_chunk, e.last_chunk] for e in session.events],
        "played_to": session.pace.played_to,
        "muxer": {"frames": muxer.frames, "samples": muxer.samples, "packets": muxer.packets},
        "sent": [{k: v for k, v in asdict(c).items() if k != "data"} | {"bytes": len(c.data)} for c in session.sent],
    }
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(whole, metadata={"session": json.dumps(facts)})


def packed_at(data: bytes) -> float:
    """Return the time of a snapshot in seconds since the epoch. Raises UserInputError for damaged data."""
    return float(_facts(data).get("packed_at", 0.0))


def unpack_session(data: bytes, talker: Talker, *, keep_key: bool = False) -> Session:
    """Return the session of a snapshot, with a new key unless ``keep_key``.

    Raises UserInputError for damaged data or a snapshot of another network.
    """
    facts = _facts(data)
    if facts.get("network") != talker.fingerprint:
        raise UserInputError("the snapshot is of another network or another number of steps: resume it where it began")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserInputError(f"the snapshot is damaged: {error}. Start a new session") from None
    row = ClipRow(
        cond=_unpack_condition(tensors).to(talker.device),
        cache=_unpack_cache(tensors, talker.window_chunks).to(talker.device),
        chunk=facts["chunk"],
        seed=facts["seed"],
    )
    key = facts["key"] if keep_key else new_key()
    session = Session(talker, row, key=key, state=_unpack_muxer(facts["muxer"], tensors))
    session.decoder.load_state(_under("decoder.", tensors))
    session.words.words = [Word(word=w, start=s, end=e) for w, s, e in facts["words"]]
    session.words.end = facts["words_end"]
    session.events = [
        SpokenEvent(event_id=i, first_chunk=first, last_chunk=last, accepted_at=0.0)
        for i, first, last in facts["events"]
    ]
    session.pace.played_to = facts["played_to"]
    sent, at = tensors["sent"].numpy().tobytes(), 0
    for entry in facts["sent"]:
        size = entry.pop("bytes")
        events: dict[str, Any] = {name: tuple(entry.pop(name)) for name in ("started", "active", "completed")}
        session.sent.append(MadeChunk(data=sent[at : at + size], **entry, **events))
        at += size
    return session


def _facts(data: bytes) -> dict[str, Any]:
    try:
        size = int.from_bytes(data[:_HEADER_BYTES], "little")
        header = json.loads(data[_HEADER_BYTES : _HEADER_BYTES + size])
        return json.loads(header["__metadata__"]["session"])
    except (ValueError, KeyError, TypeError):
        raise UserInputError("the snapshot is damaged. Start a new session") from None


def _pack_cache(cache: LayeredKVCache) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, layers, positions in (
        ("sink", cache.sink, cache.sink_positions),
        ("past", cache.past, cache.past_positions),
    ):
        for i, layer in enumerate(layers):
            found |= {f"{part}.{i}.k": layer.k, f"{part}.{i}.v": layer.v}
        if positions is not None:
            found |= {f"{part}.at.{name}": value for name, value in vars(positions).items()}
    return found


def _unpack_cache(tensors: Mapping[str, Tensor], window: int) -> LayeredKVCache:
    def layers(part: str) -> tuple[KeyValue, ...]:
        count = sum(name.startswith(f"{part}.") and name.endswith(".k") for name in tensors)
        return tuple(KeyValue(tensors[f"{part}.{i}.k"], tensors[f"{part}.{i}.v"]) for i in range(count))

    past = _under("past.at.", tensors)
    return LayeredKVCache(
        window=window,
        sink=layers("sink"),
        sink_positions=TokenPositions(**_under("sink.at.", tensors)),
        past=layers("past"),
        past_positions=TokenPositions(**past) if past else None,
    )


def _pack_condition(cond: Condition) -> dict[str, Tensor]:
    return {f"cond.{name}": value for name, value in vars(cond).items() if value is not None}


def _unpack_condition(tensors: Mapping[str, Tensor]) -> Condition:
    parts: dict[str, Any] = dict.fromkeys(("first_frame", "voice", "voice_mask")) | _under("cond.", tensors)
    return Condition(**parts)


def _unpack_muxer(counts: Mapping[str, int], tensors: Mapping[str, Tensor]) -> MuxerState:
    kept: dict[str, np.ndarray | None] = {
        name: tensors[f"muxer.{name}"].numpy() if f"muxer.{name}" in tensors else None for name in ("frames", "samples")
    }
    return MuxerState(**counts, kept_frames=kept["frames"], kept_samples=kept["samples"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
