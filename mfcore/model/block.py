"""One branch's part of one layer. Coupling happens between ``project`` and ``update``, in the transformer.

Letters: B batch, K chunks, N tokens of the branch, d width, H heads, G heads of keys and values, e head width,
R runs of N / R tokens that share a noise level: chunks where all hold as many tokens, else single tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mfcore.model.attention import attend, merge_heads, split_heads, transpose_heads
from mfcore.model.config import ModelConfig
from mfcore.model.kv_cache import KeyValue
from mfcore.model.rope import Rotation, rotate

RMS_EPS, LAYER_EPS = 1e-6, 1e-5  # added to the variance
KEYS_VALUES = "b n (two h e) -> two b n h e"


class PerHeadRMSNorm(nn.Module):
    """RMS norm over a head, with a learned scale and, where attention is to begin local, a learned offset.

    The offset is what makes attention local from the start: an equal constant in query and key adds
    sum cos(w (t_q - t_k)) to the logits once both are rotated.
    """

    def __init__(self, head_dim: int, *, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.offset = nn.Parameter(torch.empty(head_dim)) if offset else None

    def forward(self, x: Float[Tensor, "*batch e"]) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.offset is None:
            return F.rms_norm(x, x.shape[-1:], weight, eps=RMS_EPS).to(x.dtype)  # autocast widens it
        return torch.addcmul(self.offset.to(x.dtype), F.rms_norm(x, x.shape[-1:], eps=RMS_EPS).to(x.dtype), weight)


class FullWidthRMSNorm(nn.Module):
    """RMS norm over all heads together, with a learned scale (Wan's layout)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "B N H e"]) -> Tensor:
        flat = x.flatten(2)
        y = F.rms_norm(flat, flat.shape[-1:], self.weight.to(x.dtype), eps=RMS_EPS).to(x.dtype)
        return split_heads(y, x.shape[3])


def query_key_norm(config: ModelConfig, heads: int, *, offset: bool = False) -> nn.Module:
    if config.layout == "wan":
        return FullWidthRMSNorm(heads * config.head_dim)
    return PerHeadRMSNorm(config.head_dim, offset=offset)


class ModulationTable(nn.Module):
    """A block's own share of the modulation, added to what all blocks of the branch have in common."""

    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(parts, dim))

    def forward(self, shared: Float[Tensor, "B K pd"]) -> Float[Tensor, "p B K d"]:
        return shared.unflatten(-1, (self.parts, -1)).permute(2, 0, 1, 3) + self.weight[:, None, None]


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Embedded conditions of one branch; token 0 of both is a learned "nothing here", so no softmax runs empty."""

    caption: Float[Tensor, "B 1+L d"]
    caption_mask: Float[Tensor, "B 1 1 1+L"]  # to be added to logits
    words: Float[Tensor, "B 1+W d"]
    words_mask: Float[Tensor, "B 1 N 1+W"]  # the same: words near each token's time
    words_turn: Rotation  # of W words
    token_turn: Rotation  # of N tokens


@dataclass(frozen=True, kw_only=True)
class TextKeyValues:
    """Keys and values of the conditions in one block: they do not depend on the noise level."""

    caption: KeyValue
    words: KeyValue


class TextAttention(nn.Module):
    """Cross-attention to the caption (no positions) and to the timestamped transcript."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.dim, config.head_dim
        reading = config.transcript_heads * config.head_dim
        self.widths = [dim, reading]
        self.query = nn.Linear(dim, dim + reading)
        self.caption = nn.Linear(dim, 2 * dim)
        self.words = nn.Linear(dim, 2 * reading)
        self.norm_caption_q, self.norm_caption_k = (query_key_norm(config, config.heads) for _ in range(2))
        self.norm_words_q, self.norm_words_k = (PerHeadRMSNorm(config.head_dim, offset=True) for _ in range(2))
        self.out = nn.Linear(dim + reading, dim)

    def project_caption(self, caption: Float[Tensor, "B 1+L d"]) -> KeyValue:
        k, v = rearrange(self.caption(caption), KEYS_VALUES, two=2, e=self.head_dim)
        return KeyValue(transpose_heads(self.norm_caption_k(k)), transpose_heads(v))

    def project_text(self, text: TextTokens, caption: KeyValue | None = None) -> TextKeyValues:
        """``caption``: what ``hear_caption`` makes of its tokens, if known."""
        k, v = rearrange(self.words(text.words), KEYS_VALUES, two=2, e=self.head_dim)
        # "nothing said" stands at no time: a zero key gives the same logit wherever the token stands
        k = F.pad(rotate(self.norm_words_k(k[:, 1:]), text.words_turn), (0, 0, 0, 0, 1, 0))
        words = KeyValue(transpose_heads(k), transpose_heads(v))
        return TextKeyValues(caption=caption or self.project_caption(text.caption), words=words)

    def forward(self, x: Float[Tensor, "B N d"], text: TextTokens, heard: TextKeyValues) -> Float[Tensor, "B N d"]:
        about, said = (split_heads(q, self.head_dim) for q in self.query(x).split(self.widths, dim=-1))
        about = attend(transpose_heads(self.norm_caption_q(about)), heard.caption.k, heard.caption.v, text.caption_mask)
        said = rotate(self.norm_words_q(said), text.token_turn)
        said = attend(transpose_heads(said), heard.words.k, heard.words.v, text.words_mask)
        return self.out(torch.cat([merge_heads(about), merge_heads(said)], dim=-1))


def modulate(
    x: Float[Tensor, "B N d"], shift: Float[Tensor, "B R 1 d"], scale: Float[Tensor, "B R 1 d"]
) -> Float[Tensor, "B N d"]:
    """Layer norm without weights, then the affine map that the noise level asks for. ``scale``: about 1."""
    y = F.layer_norm(x, x.shape[-1:], eps=LAYER_EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, y, scale).flatten(1, 2)


def gated(
    x: Float[Tensor, "B N d"], gate: Float[Tensor, "B R 1 d"], y: Float[Tensor, "B N d"]
) -> Float[Tensor, "B N d"]:
    """x + gate y."""
    runs = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, runs), gate, y.unflatten(1, runs)).flatten(1, 2)


class Block(nn.Module):
    """Self-attention projections, text attention and feed-forward of one branch in one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.dim, config.head_dim
        keys = config.key_heads * config.head_dim
        self.widths = [dim, keys, keys]
        self.table = ModulationTable(6, dim)
        self.qkv = nn.Linear(dim, dim + 2 * keys)
        self.norm_q, self.norm_k = (
            query_key_norm(config, heads, offset=config.local_start) for heads in (config.heads, config.key_heads)
        )
        self.out = nn.Linear(dim, dim)
        self.norm_text = nn.LayerNorm(dim, eps=LAYER_EPS)
        self.text = TextAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_width), nn.GELU(approximate="tanh"), nn.Linear(config.mlp_width, dim)
        )

    def modulation(self, shared: Float[Tensor, "B K pd"], chunk: Tensor | None) -> tuple[Tensor, ...]:
        """Shift, scale and gate for attention and feed-forward, each (B, R, 1, d), by the chunk's noise level.

        ``chunk``: of each token; None where all chunks hold as many.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.table(shared)
        parts = (shift, 1 + scale, gate, mlp_shift, 1 + mlp_scale, mlp_gate)
        return tuple((p if chunk is None else p.index_select(1, chunk))[:, :, None] for p in parts)

    def project(self, x: Float[Tensor, "B N d"], mod: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H, e), keys (normed, not rotated) and values, both (B, N, G, e)."""
        q, k, v = (
            split_heads(part, self.head_dim)
            for part in self.qkv(modulate(x, mod[0], mod[1])).split(self.widths, dim=-1)
        )
        return self.norm_q(q), self.norm_k(k), v

    def update(
        self,
        x: Float[Tensor, "B N d"],
        attended: Float[Tensor, "B H N e"],
        mod: tuple[Tensor, ...],
        text: TextTokens,
        heard: TextKeyValues | None,
    ) -> Tensor:
        """Residual updates: attention output, text attention (``heard`` of ``text``, if known), feed-forward."""
        rows = merge_heads(attended).contiguous()  # of others a product adds no bias by itself
        x = gated(x, mod[2], self.out(rows))
        x = x + self.text(self.norm_text(x), text, heard or self.text.project_text(text))
        return gated(x, mod[5], self.mlp(modulate(x, mod[3], mod[4])))
