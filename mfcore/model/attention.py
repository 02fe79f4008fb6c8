"""Attention and its visibility: one function with three backends.

Chunk q attends to the sink, to the chunks in its window and to itself. A key is visible to consecutive chunks, from
``first`` to ``last``. The sink has a constant offset, the edge of the window, so each query chunk has a separate
rotated copy of the sink keys (METHOD 4).

========= ==================  =========================================================
mask      backend             use
========= ==================  =========================================================
Tensor    SDPA, dense         reference, any device
BlockMask FlexAttention       training on CUDA: invisible blocks are skipped
None      SDPA without mask   streaming: the cache contains only visible keys
========= ==================  =========================================================
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Backend = Literal["sdpa", "flex"]
Mask = Float[Tensor, "*#B q k"] | BlockMask | None


@dataclass(frozen=True, kw_only=True)
class AttentionVisibility:
    """Visibility of keys: those of the same track, visible in the chunk of the query."""

    chunk: Int64[Tensor, " q"]
    first: Int64[Tensor, " k"]
    last: Int64[Tensor, " k"]
    track: Int64[Tensor, " q"]  # 0 in a coupled network, else the branch
    key_track: Int64[Tensor, " k"]

    def dense(self) -> Bool[Tensor, "q k"]:
        """Return the dense mask, True where a key is visible."""
        chunk, track = self.chunk[:, None], self.track[:, None]
        return (self.first <= chunk) & (chunk <= self.last) & (track == self.key_track)

    def blocks(self, device: torch.device) -> BlockMask:
        """Return the block mask for FlexAttention."""
        chunk, track = self.chunk.to(device), self.track.to(device)
        first, last = self.first.to(device), self.last.to(device)
        key_track = self.key_track.to(device)

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del batch, head
            return (first[k] <= chunk[q]) & (chunk[q] <= last[k]) & (track[q] == key_track[k])

        return create_block_mask(visible, None, None, len(chunk), len(first), device, _compile=device.type == "cuda")

    def mask(self, backend: Backend, device: torch.device) -> Mask:
        """Return the mask for ``attend``. On a CPU, where FlexAttention has no gradient, "flex" uses SDPA.

        A dense mask that hides nothing becomes None.
        """
        if backend == "flex" and device.type == "cuda":
            return self.blocks(device)
        dense = self.dense()
        return None if bool(dense.all()) else additive_mask(dense.to(device, non_blocking=True))


def additive_mask(visible: Bool[Tensor, "*#B q k"]) -> Float[Tensor, "*#B q k"]:
    """Return a mask that is added to logits: 0 where ``visible``, else minus infinity.

    SDPA would otherwise convert a boolean mask in every layer.
    """
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)


def attend(
    q: Float[Tensor, "B H q e"],
    k: Float[Tensor, "B G k e"],
    v: Float[Tensor, "B G k e"],
    mask: Mask,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H q e"]:
    """Return softmax(q k^T scale) v over the visible keys. Heads share the G groups of keys and values.

    The softmax statistics are float32 for any input dtype. ``scale``: default 1 / sqrt(e).
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = _compiled_flex_attention() if q.is_cuda else flex_attention
        return cast(Tensor, flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped))
    mask = None if mask is None else mask.to(q.dtype)  # required by CUDA kernels
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def attend_with_bias(
    q: Float[Tensor, "B H q e"],
    k: Float[Tensor, "B G k e"],
    v: Float[Tensor, "B G k e"],
    mask: Mask,
    *,
    query_bias: Float[Tensor, "H q"],
    key_factor: Float[Tensor, " k"],
) -> Float[Tensor, "B H q e"]:
    """Return the result of ``attend`` with query_bias x key_factor added to the logits.

    The product is one more channel of queries and keys, so every backend computes it, with its gradient.
    """
    width = q.shape[-1]
    channel = (query_bias * width**0.5).to(q.dtype)[None, :, :, None].expand(q.shape[0], -1, -1, -1)
    factor = key_factor.to(k.dtype)[None, None, :, None].expand(k.shape[0], k.shape[1], -1, -1)
    # kernels require values as wide as the keys
    wider = (torch.cat([q, channel], dim=-1), torch.cat([k, factor], dim=-1), F.pad(v, (0, 1)))
    return attend(*wider, mask, scale=width**-0.5)[..., :width]


# torch views instead of einops, which costs 4 us per call: a tenth of a streaming pass


def split_heads(x: Float[Tensor, "B N He"], width: int) -> Float[Tensor, "B N H e"]:
    """Split the last axis into heads of ``width`` elements."""
    return x.unflatten(-1, (-1, width))


def merge_heads(x: Float[Tensor, "B H N e"]) -> Float[Tensor, "B N He"]:
    """Merge the heads of an attention output per token."""
    return x.transpose(1, 2).flatten(2)


def transpose_heads(x: Float[Tensor, "B N H e"]) -> Float[Tensor, "B H N e"]:
    """Move the heads before the tokens for ``attend``, as a view."""
    return x.transpose(1, 2)


@cache
def _compiled_flex_attention() -> Any:
    """Compile FlexAttention to one kernel; without compilation it computes all blocks."""
    return torch.compile(flex_attention)
