"""Data shared by the passes of the transformer over the same chunks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mfcore.model.attention import Mask
from mfcore.model.block import TextKeyValues, TextTokens
from mfcore.model.kv_cache import CacheView, TokenPositions
from mfcore.model.ring_cache import RingKVCache
from mfcore.model.rope import Rotation
from mfcore.types import Condition, Streams


@dataclass(frozen=True)
class Coupling:
    """Branches of the queries and keys of a pass."""

    query_branch: Int64[Tensor, " q"]  # number in MODALITIES
    key_is_audio: Float[Tensor, " k"]  # 1 or 0


@dataclass(frozen=True)
class PreparedPass:
    """Data that passes over the same chunks share, independent of the noise level."""

    cond: Condition
    times: dict[str, Tensor]
    positions: TokenPositions  # of all tokens, in the order of attention
    rank_spans: dict[str, list[slice]]  # token span of each rank, per branch; one span without sequence parallelism
    branch_tokens: list[int]  # tokens that this rank computes, per branch
    rank_tokens: list[int]  # tokens of all branches, per rank
    chunk_index: dict[str, Tensor]  # chunk of each token, counted from the first chunk of the pass
    level_index: dict[str, Tensor | None]  # chunk_index, or None if all chunks have equally many tokens in the branch
    rank_level_index: dict[str, Tensor | None]  # level_index of the tokens that this rank computes
    phases: dict[str, Tensor] | None  # of the tokens that this rank computes; None without chunk_phase
    text: dict[str, TextTokens]
    text_keys: dict[str, list[TextKeyValues]] | None  # per layer; None for a single pass
    rotation: Rotation
    mask: Mask
    coupling: Coupling | None  # None without a bias on logits between branches

    def is_reusable(self, x: Streams, cond: Condition) -> bool:
        """Return True if a pass over ``x`` with ``cond`` has the same data."""
        same = self.cond is cond and self.times.keys() == x.keys()
        return same and all(torch.equal(s.times, self.times[m]) for m, s in x.items())


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of every layer of one pass, apart from the tokens."""

    prepared: PreparedPass
    modulation: dict[str, Tensor]  # per branch
    cache: CacheView | RingKVCache


def has_even_chunks(chunk: Int64[Tensor, " N"]) -> bool:
    """Return True if all chunks have equally many consecutive tokens."""
    counts = chunk.unique_consecutive(return_counts=True)[1]
    return bool((counts == counts[0]).all())
