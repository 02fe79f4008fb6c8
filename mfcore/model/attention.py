"""Who may attend to whom, and the attention itself: one function, three ways to compute it.

Chunk q sees the sink, the chunks of its window before it, and itself. Seen from a key: it is visible to a run of
chunks, from ``first`` to ``last``. The sink stands at a constant offset, the window's edge, so each query chunk has its
own rotated copy of the sink's keys, which it alone sees (METHOD 4).

========  ==================  =========================================================================
mask      computed by         for
========  ==================  =========================================================================
a Tensor  SDPA, dense         the reference; any device
BlockMask FlexAttention       training on CUDA: blocks that nobody sees are skipped
None      SDPA without mask   streaming: the cache holds nothing but what the chunk sees
========  ==================  =========================================================================
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
    """Which keys each query sees: those of its own track whose run of chunks holds the query's chunk."""

    chunk: Int64[Tensor, " q"]
    first: Int64[Tensor, " k"]
    last: Int64[Tensor, " k"]
    track: Int64[Tensor, " q"]  # all alike in a coupled network, else the branch
    key_track: Int64[Tensor, " k"]

    def dense(self) -> Bool[Tensor, "q k"]:
        chunk, track = self.chunk[:, None], self.track[:, None]
        return (self.first <= chunk) & (chunk <= self.last) & (track == self.key_track)

    def blocks(self, device: torch.device) -> BlockMask:
        """The same for FlexAttention."""
        chunk, first, last, track, key_track = (
            part.to(device) for part in (self.chunk, self.first, self.last, self.track, self.key_track)
        )

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            del batch, head
            return (first[k] <= chunk[q]) & (chunk[q] <= last[k]) & (track[q] == key_track[k])

        return create_block_mask(visible, None, None, len(chunk), len(first), device, _compile=device.type == "cuda")

    def mask(self, backend: Backend, device: torch.device) -> Mask:
        """For ``attend``. FlexAttention has no gradient on a CPU: there its place is taken by the reference, of which a
        mask that forbids nothing is dropped."""
        if backend == "flex" and device.type == "cuda":
            return self.blocks(device)
        dense = self.dense()
        return None if bool(dense.all()) else additive_mask(dense.to(device, non_blocking=True))


def additive_mask(seen: Bool[Tensor, "*#B q k"]) -> Float[Tensor, "*#B q k"]:
    """As a mask for ``attend``, which would make this of it in every layer: 0 where ``seen``, else minus infinity."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def attend(
    q: Float[Tensor, "B H q e"], k: Float[Tensor, "B G k e"], v: Float[Tensor, "B G k e"], mask: Mask
) -> Float[Tensor, "B H q e"]:
    """softmax(q k^T / sqrt(e)) v over the keys that ``mask`` allows; heads share the G groups of keys and values.

    The statistics of the softmax are float32, whatever the inputs are.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = _compiled() if q.is_cuda else flex_attention
        return cast(Tensor, flex(q, k, v, block_mask=mask, enable_gqa=grouped))
    mask = None if mask is None else mask.to(q.dtype)  # kernels for CUDA want that
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


# Views by torch's own names: einops takes 4 us to find each, in a stream a tenth of a pass.


def split_heads(x: Float[Tensor, "B N He"], width: int) -> Float[Tensor, "B N H e"]:
    """Heads of ``width`` numbers, side by side as a product leaves them."""
    return x.unflatten(-1, (-1, width))


def merge_heads(x: Float[Tensor, "B H N e"]) -> Float[Tensor, "B N He"]:
    """What ``attend`` returns, token by token."""
    return x.transpose(1, 2).flatten(2)


def transpose_heads(x: Float[Tensor, "B N H e"]) -> Float[Tensor, "B H N e"]:
    """For ``attend``, without a copy: until then a token's heads lie side by side, as a product leaves them."""
    return x.transpose(1, 2)


@cache
def _compiled() -> Any:
    """FlexAttention as one kernel; uncompiled it multiplies everything."""
    return torch.compile(flex_attention)
