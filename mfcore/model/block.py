"""One branch's part of one layer. Coupling happens between ``project`` and ``update``, in the transformer.

Letters: B batch, K chunks, N tokens of the branch, d width, H heads, e head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mfcore.model.attention import attend
from mfcore.model.rope import rotate


class HeadNorm(nn.Module):
    """RMS norm over a head, with a learned scale and, for text, a learned offset.

    The offset is what makes attention local in time from the start: an equal constant in query and key adds
    sum cos(w (t_q - t_k)) to the logits once both are rotated.
    """

    def __init__(self, head_dim: int, *, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.offset = nn.Parameter(torch.empty(head_dim)) if offset else None

    def forward(self, x: Float[Tensor, "*batch e"]) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)
        return y if self.offset is None else y + self.offset.to(x.dtype)


class Table(nn.Module):
    """A block's own share of the modulation, added to what all blocks of the branch have in common."""

    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(parts, dim))

    def forward(self, shared: Float[Tensor, "B K pd"]) -> Float[Tensor, "p B K d"]:
        return rearrange(shared, "b k (p d) -> p b k d", p=self.parts) + self.weight[:, None, None]


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Embedded conditions of one branch; token 0 of both is a learned "nothing here", so no softmax runs empty."""

    caption: Float[Tensor, "B 1+L d"]
    caption_mask: Bool[Tensor, "B 1 1 1+L"]
    words: Float[Tensor, "B 1+W d"]
    words_mask: Bool[Tensor, "B 1 N 1+W"]  # words near each token's time
    words_angle: Float[Tensor, "B 1 W half"]
    token_angle: Float[Tensor, "N half"]


class TextAttention(nn.Module):
    """Cross-attention to the caption (no positions) and to the timestamped transcript."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, 2 * dim)
        self.caption = nn.Linear(dim, 2 * dim)
        self.words = nn.Linear(dim, 2 * dim)
        self.norm_caption_q, self.norm_caption_k = HeadNorm(dim // heads), HeadNorm(dim // heads)
        self.norm_words_q, self.norm_words_k = (HeadNorm(dim // heads, offset=True) for _ in range(2))
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, x: Float[Tensor, "B N d"], text: TextTokens) -> Float[Tensor, "B N d"]:
        split = "b n (two h e) -> two b h n e"
        q_caption, q_words = rearrange(self.query(x), split, two=2, h=self.heads)
        k, v = rearrange(self.caption(text.caption), split, two=2, h=self.heads)
        about = attend(self.norm_caption_q(q_caption), self.norm_caption_k(k), v, text.caption_mask)
        k, v = rearrange(self.words(text.words), split, two=2, h=self.heads)
        # "nothing said" stands at no time: a zero key gives the same logit wherever the token stands
        k = F.pad(rotate(self.norm_words_k(k[:, :, 1:]), text.words_angle), (0, 0, 1, 0))
        said = attend(rotate(self.norm_words_q(q_words), text.token_angle), k, v, text.words_mask)
        return self.out(rearrange([about, said], "two b h n e -> b n (two h e)"))


def modulate(x: Float[Tensor, "B N d"], shift: Tensor, scale: Tensor) -> Float[Tensor, "B N d"]:
    """Layer norm without weights, then the affine map that the noise level asks for."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention projections, text attention and feed-forward of one branch in one layer."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = int(dim * mlp_ratio)
        self.table = Table(6, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q, self.norm_k = HeadNorm(dim // heads), HeadNorm(dim // heads)
        self.out = nn.Linear(dim, dim)
        self.norm_text = nn.LayerNorm(dim)
        self.text = TextAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def modulation(self, shared: Float[Tensor, "B K pd"], chunk: Tensor) -> Float[Tensor, "6 B N d"]:
        """Shift, scale and gate for attention and feed-forward, for each token by its chunk's noise level."""
        return self.table(shared)[:, :, chunk]

    def project(self, x: Float[Tensor, "B N d"], mod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normed, not rotated) and values, each (B, H, N, e)."""
        q, k, v = rearrange(self.qkv(modulate(x, mod[0], mod[1])), "b n (c h e) -> c b h n e", c=3, h=self.heads)
        return self.norm_q(q), self.norm_k(k), v

    def update(
        self, x: Float[Tensor, "B N d"], attended: Float[Tensor, "B H N e"], mod: Tensor, text: TextTokens
    ) -> Tensor:
        """Residual updates: attention output, text attention, feed-forward."""
        x = x + mod[2] * self.out(rearrange(attended, "b h n e -> b n (h e)"))
        x = x + self.text(self.norm_text(x), text)
        return x + mod[5] * self.mlp(modulate(x, mod[3], mod[4]))
