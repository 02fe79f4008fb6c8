"""A memory for streaming: room that is allocated once and changed in place, so that no chunk costs more than another.

Keys carry their positions in their rotation, so a layer's keys may stand in any order. They fill places 0 to n - 1
without a gap, the sink first, and attention runs over that slice: no mask, and no copy but of a token or two where a
chunk holds fewer latents than the one that it displaces.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mfcore.model.attention import AttentionVisibility
from mfcore.model.caption_cache import CachedCaption
from mfcore.model.kv_cache import KeyValue, LayeredKVCache, TokenPositions
from mfcore.model.rope import Rotation, rotate
from mfcore.types import KVCache

NO_SLOTS = torch.zeros(0, dtype=torch.int64)


class RingKVCache:
    """Sink, the chunks of the window, and the chunk at work. One pass holds one chunk, and has no gradient.

    Mutable: passes write keys and values in place, and every method that returns a ring returns this one.

    A copy to come back to, or to go on from more than once, is a ``snapshot``; ``ring_of`` it continues from there.
    """

    def __init__(self, source: LayeredKVCache, chunk_tokens: int) -> None:
        """With what ``source`` remembers. ``chunk_tokens``: most tokens of a chunk."""
        self._opened = replace(source, past=(), past_at=None, passes=None)
        self.chunk_tokens = chunk_tokens
        batch, heads, sink, width = source.sink[0].k.shape
        room = sink + (source.window + 1) * chunk_tokens
        self.k = source.sink[0].k.new_zeros(len(source.sink), batch, heads, room, width)
        self.v = torch.zeros_like(self.k)
        self._sink_k = torch.stack([kv.k for kv in source.sink])
        self.v[:, :, :, :sink] = torch.stack([kv.v for kv in source.sink])
        self.chunk: int | None = None  # at work
        self.scene: Any = None  # what the network need not find out again while that chunk is at work
        self.captions: dict[str, CachedCaption] = {}  # by branch; good for more than a chunk
        self._own = NO_SLOTS  # places of its tokens
        self._place = torch.zeros(room, dtype=torch.int64, device=self.k.device)  # the same where the keys are
        self._past, self._past_at = NO_SLOTS, source.past_at  # places of the window's tokens, and where these stand
        if source.past_at is not None:
            self._past = sink + torch.arange(len(source.past_at))
            for layer, kv in enumerate(source.past):
                self._write(layer, self._past, kv)

    @property
    def sink_at(self) -> TokenPositions:
        return self._opened.sink_at

    @property
    def past_at(self) -> TokenPositions | None:
        return self._past_at

    @property
    def num_bytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self._sink_k))

    def begin_chunk(self, at: TokenPositions, sink: Rotation) -> None:
        """Put a chunk to work: forget what it cannot see, find places for its tokens ``at``, turn the sink's keys."""
        self.chunk, self.scene = int(at.chunk[0]), None
        assert bool((at.chunk == self.chunk).all()), "a ring takes one chunk at a time"
        self.evict_before(self.chunk)
        self._own = self._places(len(at))
        self._place[: len(self._own)].copy_(self._own)
        self.k[:, :, :, : len(self.sink_at)] = rotate(self._sink_k, sink)

    def visibility(self, at: TokenPositions) -> AttentionVisibility:
        """Who sees whom where branches do not see each other; of a coupled network everything is visible."""
        branch = torch.empty(self.used_slots, dtype=torch.int64)
        branch[: len(self.sink_at)] = self.sink_at.branch
        branch[self._own] = at.branch
        if self._past_at is not None:
            branch[self._past] = self._past_at.branch
        always = torch.full_like(branch, int(at.chunk[0]))
        return AttentionVisibility(chunk=at.chunk, first=always, last=always, track=at.branch, key_track=branch)

    def join(self, layer: int, own: KeyValue) -> KeyValue:
        """What a pass attends to in a layer; its own keys and values take the places of those of the pass before."""
        assert not own.k.requires_grad, "a ring is for streaming: run it without gradient"
        self.write_layer(layer, own)
        return KeyValue(self.k[layer, :, :, : self.used_slots], self.v[layer, :, :, : self.used_slots])

    def write_layer(self, layer: int, own: KeyValue) -> None:
        """Keys and values of the chunk at work, in its places."""
        self._write(layer, self._place[: len(self._own)], own)

    def append(self, layers: list[KeyValue], at: TokenPositions) -> "RingKVCache":
        """The chunk at work becomes history. All layers but the last were written when they were attended to."""
        self.write_layer(len(layers) - 1, layers[-1])
        return self.commit_chunk(at)

    def commit_chunk(self, at: TokenPositions) -> "RingKVCache":
        """The chunk at work, all of whose layers have been put, becomes history."""
        self._past = torch.cat([self._past, self._own])
        self._past_at = at if self._past_at is None else self._past_at.join(at)
        self._own, self.chunk, self.scene = NO_SLOTS, None, None
        return self

    def evict_before(self, chunk: int) -> "RingKVCache":
        """Forget chunks that ``chunk`` and its successors cannot see."""
        if self._past_at is not None:
            keep = self._past_at.chunk >= chunk - self._opened.window
            self._past, self._past_at = self._past[keep], self._past_at.select(keep)
        return self

    def detach(self) -> "RingKVCache":
        return self

    def shared_passes(self) -> "RingKVCache":
        return self

    def snapshot(self) -> LayeredKVCache:
        """A copy of what is remembered, as a value. The chunk at work is left out."""
        if self._past_at is None:
            return self._opened
        place = self._past.to(self.k.device)
        past = tuple(KeyValue(k[:, :, place], v[:, :, place]) for k, v in zip(self.k, self.v, strict=True))
        return replace(self._opened, past=past, past_at=self._past_at)

    def rows(self, index: Tensor) -> "RingKVCache":
        return RingKVCache(self.snapshot().rows(index), self.chunk_tokens)

    @classmethod
    def stack(cls, parts: Sequence["RingKVCache"]) -> "RingKVCache":
        return cls(LayeredKVCache.stack([part.snapshot() for part in parts]), parts[0].chunk_tokens)

    @property
    def used_slots(self) -> int:
        """Places that hold something."""
        return len(self.sink_at) + len(self._past) + len(self._own)

    def _write(self, layer: int, places: Tensor, new: KeyValue) -> None:
        place = places.to(self.k.device)
        self.k[layer].index_copy_(2, place, new.k.to(self.k.dtype))
        self.v[layer].index_copy_(2, place, new.v.to(self.v.dtype))

    def _places(self, need: int) -> Tensor:
        """``need`` free places such that all used ones stand without a gap: the window's last tokens may move."""
        sink = len(self.sink_at)
        used = sink + len(self._past) + need
        if used > self.k.shape[3]:
            raise ValueError(
                f"a chunk of {need} tokens does not fit beside {used - need} remembered ones: the ring has "
                f"{self.k.shape[3]} places, for chunks of at most {self.chunk_tokens} tokens"
            )
        free = torch.ones(used, dtype=torch.bool)
        free[:sink] = False
        beyond = self._past >= used
        free[self._past[~beyond]] = False
        gaps = free.nonzero()[:, 0]
        if bool(beyond.any()):
            target, origin = (p.to(self.k.device) for p in (gaps[: int(beyond.sum())], self._past[beyond]))
            for kept in (self.k, self.v):
                kept[:, :, :, target] = kept[:, :, :, origin]
            self._past = self._past.masked_scatter(beyond, gaps)
        return gaps[int(beyond.sum()) :]


def to_ring_cache(memory: KVCache, chunk_tokens: int) -> RingKVCache:
    """A ring that remembers what ``memory`` does, for chunks of at most ``chunk_tokens`` tokens."""
    assert isinstance(memory, LayeredKVCache | RingKVCache)
    return RingKVCache(memory.snapshot(), chunk_tokens)
