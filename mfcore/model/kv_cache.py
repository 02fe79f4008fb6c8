"""KV cache as a value: keys and values of the sink and of past chunks, per layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mfcore.device import row_indices, to_device_of
from mfcore.model.rope import Rotation, rotate
from mfcore.types import MODALITIES


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer."""

    k: Float[Tensor, "B H N d"]
    v: Float[Tensor, "B H N d"]

    def detach(self) -> "KeyValue":
        """Return the keys and values without gradient."""
        return KeyValue(self.k.detach(), self.v.detach())

    def rows(self, index: Tensor | slice) -> "KeyValue":
        """Select rows of the batch."""
        return KeyValue(self.k[index], self.v[index])

    def to(self, device: torch.device) -> "KeyValue":
        """Move keys and values."""
        return KeyValue(self.k.to(device), self.v.to(device))

    def join(self, *others: "KeyValue") -> "KeyValue":
        """Concatenate along the tokens."""
        parts = (self, *others)
        return KeyValue(torch.cat([p.k for p in parts], dim=2), torch.cat([p.v for p in parts], dim=2))

    @staticmethod
    def stack(parts: Sequence["KeyValue"]) -> "KeyValue":
        """Concatenate along the batch."""
        return KeyValue(torch.cat([p.k for p in parts]), torch.cat([p.v for p in parts]))


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Positions of tokens: chunk, start in seconds, row, column and branch number of each."""

    chunk: Int64[Tensor, " N"]
    times: Float64[Tensor, " N"]
    ys: Int64[Tensor, " N"]
    xs: Int64[Tensor, " N"]
    branch: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return self.chunk.shape[0]

    def join(self, other: "TokenPositions") -> "TokenPositions":
        """Append the positions of ``other``."""
        return TokenPositions(**{k: torch.cat([v, vars(other)[k]]) for k, v in vars(self).items()})

    def select(self, keep: Tensor | slice) -> "TokenPositions":
        """Return the positions of some tokens (mask, indices or slice)."""
        return TokenPositions(**{k: v[keep] for k, v in vars(self).items()})


class PassCache:
    """Prepared passes over one KV cache, at most one per gradient mode. Mutable: the network adds the entries."""

    def __init__(self) -> None:
        self.entries: dict[bool, Any] = {}  # by torch.is_grad_enabled()


@dataclass(frozen=True, kw_only=True)
class LayeredKVCache:
    """KV cache with value semantics: passes may share it, and a snapshot is the cache itself.

    Keys of the sink are not rotated, because their offset to the chunk is constant. Keys of the past are rotated.
    """

    window: int  # chunks of history that a chunk may see
    sink: tuple[KeyValue, ...]
    sink_positions: TokenPositions
    past: tuple[KeyValue, ...] = ()
    past_positions: TokenPositions | None = None
    passes: PassCache | None = None  # shared passes over this cache; derived caches have none

    def shared_passes(self) -> "LayeredKVCache":
        """Return the same keys and values for passes that share a ``PreparedPass``."""
        return replace(self, passes=PassCache())

    def without_passes(self) -> "LayeredKVCache":
        """Return the same keys and values without shared passes."""
        return replace(self, passes=None)

    def detach(self) -> "LayeredKVCache":
        """Return the cache without gradient."""
        return replace(
            self,
            sink=tuple(kv.detach() for kv in self.sink),
            past=tuple(kv.detach() for kv in self.past),
            passes=None,
        )

    def to(self, device: torch.device) -> "LayeredKVCache":
        """Move keys and values; positions stay on the CPU."""
        return replace(
            self,
            sink=tuple(kv.to(device) for kv in self.sink),
            past=tuple(kv.to(device) for kv in self.past),
            passes=None,
        )

    def rows(self, index: Tensor) -> "LayeredKVCache":
        """Select rows of the batch."""
        device_index = row_indices(index, self.sink[0].k) if self.sink else index
        return replace(
            self,
            sink=tuple(kv.rows(device_index) for kv in self.sink),
            past=tuple(kv.rows(device_index) for kv in self.past),
            passes=None,
        )

    @classmethod
    def stack(cls, parts: Sequence["LayeredKVCache"]) -> "LayeredKVCache":
        """Concatenate the rows of caches with the same chunks."""
        ordered = [p.by_chunk() for p in parts]
        sink = tuple(KeyValue.stack(layer) for layer in zip(*(p.sink for p in ordered), strict=True))
        past = tuple(KeyValue.stack(layer) for layer in zip(*(p.past for p in ordered), strict=True))
        return replace(ordered[0], sink=sink, past=past, passes=None)

    def by_chunk(self) -> "LayeredKVCache":
        """Sort tokens by chunk, then by branch, as a rollout writes them. A whole clip is written by branch."""
        if self.past_positions is None:
            return self
        order = (self.past_positions.chunk * len(MODALITIES) + self.past_positions.branch).argsort(stable=True)
        return self if bool((order.diff() == 1).all()) else self._select_tokens(order)

    def append(self, layers: list[KeyValue], positions: TokenPositions) -> "LayeredKVCache":
        """Return a cache with the rotated keys and the values of the tokens at ``positions`` added."""
        if self.past_positions is None:
            return replace(self, past=tuple(layers), past_positions=positions, passes=None)
        past = tuple(old.join(new) for old, new in zip(self.past, layers, strict=True))
        return replace(self, past=past, past_positions=self.past_positions.join(positions), passes=None)

    def evict_before(self, chunk: int) -> "LayeredKVCache":
        """Drop the chunks that ``chunk`` and later ones cannot see."""
        if self.past_positions is None:
            return self
        keep = self.past_positions.chunk >= chunk - self.window
        return self if bool(keep.all()) else self._select_tokens(keep.nonzero()[:, 0])

    def _select_tokens(self, index: Tensor) -> "LayeredKVCache":
        """Select past tokens by index."""
        assert self.past_positions is not None
        device_index = to_device_of(index, self.past[0].k)
        past = tuple(
            KeyValue(kv.k.index_select(2, device_index), kv.v.index_select(2, device_index)) for kv in self.past
        )
        return replace(self, past=past, past_positions=self.past_positions.select(index), passes=None)

    def snapshot(self) -> "LayeredKVCache":
        """Return the cache itself: it never changes."""
        return self

    @property
    def num_bytes(self) -> int:
        """Size of keys and values in bytes."""
        tensors = [t for kv in (*self.sink, *self.past) for t in (kv.k, kv.v)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """View of a cache for the chunks of one pass: one copy of the sink per chunk, then the past."""

    cache: LayeredKVCache
    sink_copies: int
    sink_rotation: Rotation  # of the tokens of each copy, to the edge of the window of its chunk

    def join(self, layer: int, own: KeyValue) -> KeyValue:
        """Return the keys and values that the pass attends to in ``layer``; its own come last."""
        if not self.cache.sink:
            return own
        sink = self.cache.sink[layer]
        visible = KeyValue(
            rotate(sink.k[:, :, None], self.sink_rotation).flatten(2, 3), sink.v.repeat(1, 1, self.sink_copies, 1)
        )
        return visible.join(self.cache.past[layer], own) if self.cache.past else visible.join(own)
