"""Who may attend to whom, and the attention itself (reference backend: SDPA with a dense mask).

Chunk q sees the sink, the chunks of its window before it, and itself. The sink stands at a constant offset, the
window's edge, so each query chunk has its own rotated copy of the sink's keys (METHOD 4).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def history_mask(
    query_chunk: Int64[Tensor, " q"], key_chunk: Int64[Tensor, " k"], window: int, *, inclusive: bool
) -> Bool[Tensor, "q k"]:
    """Keys of the ``window`` chunks before the query's chunk, with ``inclusive`` also those of its own chunk."""
    age = query_chunk[:, None] - key_chunk[None, :]
    return (age <= window) & (age >= (0 if inclusive else 1))


def same_mask(query: Int64[Tensor, " q"], key: Int64[Tensor, " k"]) -> Bool[Tensor, "q k"]:
    """Keys that carry the query's own number (chunk, copy of the sink, or modality)."""
    return query[:, None] == key[None, :]


def attend(
    q: Float[Tensor, "B H q d"],
    k: Float[Tensor, "B H k d"],
    v: Float[Tensor, "B H k d"],
    mask: Bool[Tensor, "*#B q k"] | None,
) -> Float[Tensor, "B H q d"]:
    """softmax(q k^T / sqrt(d)) v over the keys where ``mask`` is True (None: all of them)."""
    if mask is not None:
        mask = mask.to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense_or_none(mask: Bool[Tensor, "q k"]) -> Bool[Tensor, "q k"] | None:
    """Drop a mask that forbids nothing: streaming attention then runs without one."""
    return None if bool(torch.all(mask)) else mask
