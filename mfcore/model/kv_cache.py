"""What a network remembers: keys and values of the sink and of past chunks, layer by layer."""

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
        return KeyValue(self.k.detach(), self.v.detach())

    def rows(self, index: Tensor | slice) -> "KeyValue":
        return KeyValue(self.k[index], self.v[index])

    def join(self, *others: "KeyValue") -> "KeyValue":
        parts = (self, *others)
        return KeyValue(torch.cat([p.k for p in parts], dim=2), torch.cat([p.v for p in parts], dim=2))

    @staticmethod
    def stack(parts: Sequence["KeyValue"]) -> "KeyValue":
        return KeyValue(torch.cat([p.k for p in parts]), torch.cat([p.v for p in parts]))


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """Where the tokens of one pass stand: chunk, seconds, row, column and branch number of each."""

    chunk: Int64[Tensor, " N"]
    times: Float64[Tensor, " N"]
    ys: Int64[Tensor, " N"]
    xs: Int64[Tensor, " N"]
    branch: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return self.chunk.shape[0]

    def join(self, other: "TokenPositions") -> "TokenPositions":
        return TokenPositions(**{k: torch.cat([v, vars(other)[k]]) for k, v in vars(self).items()})

    def select(self, keep: Tensor | slice) -> "TokenPositions":
        return TokenPositions(**{k: v[keep] for k, v in vars(self).items()})


class PassCache:
    """Prepared passes over one KV cache, at most one per gradient mode. Mutable: the network adds the entries."""

    def __init__(self) -> None:
        self.entries: dict[bool, Any] = {}  # by torch.is_grad_enabled()


@dataclass(frozen=True, kw_only=True)
class LayeredKVCache:
    """Sink keys are kept unrotated, because their offset is constant and not their position; past keys are rotated.

    Values, never changed in place: a memory may be shared by many passes, snapshotted by keeping it, and continued.
    """

    window: int  # chunks of history that a chunk may see
    sink: tuple[KeyValue, ...]
    sink_at: TokenPositions
    past: tuple[KeyValue, ...] = ()
    past_at: TokenPositions | None = None
    passes: PassCache | None = None  # shared passes over this cache; derived caches have none

    def shared_passes(self) -> "LayeredKVCache":
        return replace(self, passes=PassCache())

    def without_passes(self) -> "LayeredKVCache":
        """Return the same keys and values without shared passes."""
        return replace(self, passes=None)

    def detach(self) -> "LayeredKVCache":
        return replace(
            self,
            sink=tuple(kv.detach() for kv in self.sink),
            past=tuple(kv.detach() for kv in self.past),
            passes=None,
        )

    def rows(self, index: Tensor) -> "LayeredKVCache":
        there = row_indices(index, self.sink[0].k) if self.sink else index
        return replace(
            self,
            sink=tuple(kv.rows(there) for kv in self.sink),
            past=tuple(kv.rows(there) for kv in self.past),
            passes=None,
        )

    @classmethod
    def stack(cls, parts: Sequence["LayeredKVCache"]) -> "LayeredKVCache":
        """The rows of all parts, which remember the same chunks, one after the other."""
        alike = [p.by_chunk() for p in parts]
        sink = tuple(KeyValue.stack(layer) for layer in zip(*(p.sink for p in alike), strict=True))
        past = tuple(KeyValue.stack(layer) for layer in zip(*(p.past for p in alike), strict=True))
        return replace(alike[0], sink=sink, past=past, passes=None)

    def by_chunk(self) -> "LayeredKVCache":
        """Tokens by chunk, then by branch, as a roll-out writes them; a whole clip is written branch by branch."""
        if self.past_at is None:
            return self
        order = (self.past_at.chunk * len(MODALITIES) + self.past_at.branch).argsort(stable=True)
        return self if bool((order.diff() == 1).all()) else self._tokens(order)

    def append(self, layers: list[KeyValue], at: TokenPositions) -> "LayeredKVCache":
        """A memory that also holds the (rotated) keys and the values of the tokens ``at``."""
        if self.past_at is None:
            return replace(self, past=tuple(layers), past_at=at, passes=None)
        past = tuple(old.join(new) for old, new in zip(self.past, layers, strict=True))
        return replace(self, past=past, past_at=self.past_at.join(at), passes=None)

    def evict_before(self, chunk: int) -> "LayeredKVCache":
        """Forget chunks that ``chunk`` and its successors cannot see."""
        if self.past_at is None:
            return self
        keep = self.past_at.chunk >= chunk - self.window
        return self if bool(keep.all()) else self._tokens(keep.nonzero()[:, 0])

    def _tokens(self, index: Tensor) -> "LayeredKVCache":
        """The past tokens of these numbers."""
        assert self.past_at is not None
        place = to_device_of(index, self.past[0].k)
        past = tuple(KeyValue(kv.k.index_select(2, place), kv.v.index_select(2, place)) for kv in self.past)
        return replace(self, past=past, past_at=self.past_at.select(index), passes=None)

    def snapshot(self) -> "LayeredKVCache":
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes held by keys and values."""
        tensors = [t for kv in (*self.sink, *self.past) for t in (kv.k, kv.v)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """A memory as the chunks of one pass see it: a copy of the sink for each of them, then the past."""

    memory: LayeredKVCache
    copies: int
    turn: Rotation  # of each copy's tokens, to the edge of its chunk's window

    def join(self, layer: int, own: KeyValue) -> KeyValue:
        """What the pass attends to in a layer; its own keys and values come last."""
        if not self.memory.sink:
            return own
        sink = self.memory.sink[layer]
        seen = KeyValue(rotate(sink.k[:, :, None], self.turn).flatten(2, 3), sink.v.repeat(1, 1, self.copies, 1))
        return seen.join(self.memory.past[layer], own) if self.memory.past else seen.join(own)
