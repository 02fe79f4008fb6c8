"""Ring KV cache for streaming: memory that is allocated once and written in place, at constant cost per chunk.

Keys carry their positions in their rotation, so their order in memory is free. They fill slots 0 to n - 1 without a
gap, the sink first. Attention runs over that slice without a mask. Tokens are copied only if a chunk has fewer latents
than the chunk that it replaces.
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
    """KV cache of sink, window and current chunk. One pass covers one chunk, without gradient.

    Mutable: passes write keys and values in place. ``append``, ``evict_before`` and ``detach`` return the same ring.
    ``snapshot`` returns a copy, and ``to_ring_cache`` continues from it, any number of times.
    """

    def __init__(self, source: LayeredKVCache, chunk_tokens: int) -> None:
        """Copy the content of ``source``. ``chunk_tokens``: largest number of tokens in a chunk."""
        self._sink_cache = replace(source, past=(), past_positions=None, passes=None)
        self.chunk_tokens = chunk_tokens
        batch, heads, sink, width = source.sink[0].k.shape
        slots = sink + (source.window + 1) * chunk_tokens
        self.k = source.sink[0].k.new_zeros(len(source.sink), batch, heads, slots, width)
        self.v = torch.zeros_like(self.k)
        self._sink_k = torch.stack([kv.k for kv in source.sink])
        self.v[:, :, :, :sink] = torch.stack([kv.v for kv in source.sink])
        self.chunk: int | None = None  # current one, None between chunks
        self.prepared: Any = None  # PreparedPass of the current chunk
        self.captions: dict[str, CachedCaption] = {}  # per branch, valid for several chunks
        self._current_slots = NO_SLOTS  # slots of the current chunk
        self._device_slots = torch.zeros(slots, dtype=torch.int64, device=self.k.device)  # the same on the device
        self._past_slots = NO_SLOTS  # slots of the tokens in the window
        self._past_positions = source.past_positions
        if source.past_positions is not None:
            self._past_slots = sink + torch.arange(len(source.past_positions))
            for layer, kv in enumerate(source.past):
                self._write(layer, self._past_slots, kv)

    @property
    def sink_positions(self) -> TokenPositions:
        """Positions of the sink tokens."""
        return self._sink_cache.sink_positions

    @property
    def past_positions(self) -> TokenPositions | None:
        """Positions of the tokens in the window; None before the first chunk."""
        return self._past_positions

    @property
    def num_bytes(self) -> int:
        """Size of keys and values in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self._sink_k))

    def begin_chunk(self, positions: TokenPositions, sink: Rotation) -> None:
        """Start a chunk: evict old chunks, find slots for its tokens, rotate the keys of the sink."""
        self.chunk = int(positions.chunk[0])
        self.prepared = None
        assert bool((positions.chunk == self.chunk).all()), "a ring cache takes one chunk at a time"
        self.evict_before(self.chunk)
        self._current_slots = self._find_slots(len(positions))
        self._device_slots[: len(self._current_slots)].copy_(self._current_slots, non_blocking=True)
        self.k[:, :, :, : len(self.sink_positions)] = rotate(self._sink_k, sink)

    def key_branch(self, positions: TokenPositions) -> Tensor:
        """Return the branch number of every key that ``join`` returns."""
        key_branch = torch.empty(self.used_slots, dtype=torch.int64)
        key_branch[: len(self.sink_positions)] = self.sink_positions.branch
        key_branch[self._current_slots] = positions.branch
        if self._past_positions is not None:
            key_branch[self._past_slots] = self._past_positions.branch
        return key_branch

    def visibility(self, positions: TokenPositions) -> AttentionVisibility:
        """Return the visibility for uncoupled branches. In a coupled network every key is visible."""
        key_branch = self.key_branch(positions)
        current = torch.full_like(key_branch, int(positions.chunk[0]))
        return AttentionVisibility(
            chunk=positions.chunk, first=current, last=current, track=positions.branch, key_track=key_branch
        )

    def join(self, layer: int, own: KeyValue) -> KeyValue:
        """Return the keys and values visible to a pass in ``layer``; the chunk's own are written in place."""
        assert not own.k.requires_grad, "a ring cache has no gradient: run it without gradient"
        self.write_layer(layer, own)
        return KeyValue(self.k[layer, :, :, : self.used_slots], self.v[layer, :, :, : self.used_slots])

    def write_layer(self, layer: int, own: KeyValue) -> None:
        """Write keys and values of the current chunk into its slots."""
        self._write(layer, self._device_slots[: len(self._current_slots)], own)

    def append(self, layers: list[KeyValue], positions: TokenPositions) -> "RingKVCache":
        """Turn the current chunk into history. All layers but the last were already written by ``join``."""
        self.write_layer(len(layers) - 1, layers[-1])
        return self.commit_chunk(positions)

    def commit_chunk(self, positions: TokenPositions) -> "RingKVCache":
        """Turn the current chunk into history, once all its layers are written."""
        self._past_slots = torch.cat([self._past_slots, self._current_slots])
        self._past_positions = positions if self._past_positions is None else self._past_positions.join(positions)
        self._current_slots = NO_SLOTS
        self.chunk = None
        self.prepared = None
        return self

    def evict_before(self, chunk: int) -> "RingKVCache":
        """Drop the chunks that ``chunk`` and later ones cannot see."""
        if self._past_positions is not None:
            keep = self._past_positions.chunk >= chunk - self._sink_cache.window
            self._past_slots = self._past_slots[keep]
            self._past_positions = self._past_positions.select(keep)
        return self

    def detach(self) -> "RingKVCache":
        """Return the ring itself: it has no gradient."""
        return self

    def shared_passes(self) -> "RingKVCache":
        """Return the ring itself: its passes over a chunk always share a ``PreparedPass``."""
        return self

    def snapshot(self) -> LayeredKVCache:
        """Return a copy as a value, without the current chunk."""
        if self._past_positions is None:
            return self._sink_cache
        device_slots = self._past_slots.to(self.k.device)
        past = tuple(
            KeyValue(k[:, :, device_slots], v[:, :, device_slots]) for k, v in zip(self.k, self.v, strict=True)
        )
        return replace(self._sink_cache, past=past, past_positions=self._past_positions)

    def rows(self, index: Tensor) -> "RingKVCache":
        """Return a new ring with some rows of the batch."""
        return RingKVCache(self.snapshot().rows(index), self.chunk_tokens)

    @classmethod
    def stack(cls, parts: Sequence["RingKVCache"]) -> "RingKVCache":
        """Return a new ring with the rows of caches with the same chunks."""
        return cls(LayeredKVCache.stack([part.snapshot() for part in parts]), parts[0].chunk_tokens)

    @property
    def used_slots(self) -> int:
        """Number of slots in use."""
        return len(self.sink_positions) + len(self._past_slots) + len(self._current_slots)

    def _write(self, layer: int, slots: Tensor, new: KeyValue) -> None:
        device_slots = slots.to(self.k.device)
        self.k[layer].index_copy_(2, device_slots, new.k.to(self.k.dtype))
        self.v[layer].index_copy_(2, device_slots, new.v.to(self.v.dtype))

    def _find_slots(self, count: int) -> Tensor:
        """Return ``count`` free slots so that used slots have no gap. The last tokens of the window may move."""
        sink = len(self.sink_positions)
        used = sink + len(self._past_slots) + count
        if used > self.k.shape[3]:
            raise ValueError(
                f"a chunk of {count} tokens does not fit next to {used - count} cached ones: the ring has "
                f"{self.k.shape[3]} slots, for chunks of at most {self.chunk_tokens} tokens"
            )
        free = torch.ones(used, dtype=torch.bool)
        free[:sink] = False
        beyond = self._past_slots >= used
        free[self._past_slots[~beyond]] = False
        gaps = free.nonzero()[:, 0]
        if bool(beyond.any()):
            target = gaps[: int(beyond.sum())].to(self.k.device)
            origin = self._past_slots[beyond].to(self.k.device)
            for buffer in (self.k, self.v):
                buffer[:, :, :, target] = buffer[:, :, :, origin]
            self._past_slots = self._past_slots.masked_scatter(beyond, gaps)
        return gaps[int(beyond.sum()) :]


def to_ring_cache(cache: KVCache, chunk_tokens: int) -> RingKVCache:
    """Return a ring with the content of ``cache``, for chunks of at most ``chunk_tokens`` tokens."""
    assert isinstance(cache, LayeredKVCache | RingKVCache)
    return RingKVCache(cache.snapshot(), chunk_tokens)
