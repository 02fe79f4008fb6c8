"""Block of one branch. The transformer couples the branches between ``project`` and ``update``.

Letters: B batch, K chunks, N tokens of the branch, d width, H heads, G heads of keys and values, e head width,
R runs of N / R tokens with one noise level: chunks if all have equally many tokens, else single tokens.
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

RMS_EPS = 1e-6  # added to the mean square
KEYS_VALUES = "b n (two h e) -> two b n h e"


class PerHeadRMSNorm(nn.Module):
    """RMS norm over a head, with a learned scale and an optional learned offset.

    The offset makes attention local at initialization: an equal constant in query and key adds sum cos(w (t_q - t_k))
    to the logits after the rotation.
    """

    def __init__(self, head_dim: int, *, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.offset = nn.Parameter(torch.empty(head_dim)) if offset else None

    def forward(self, x: Float[Tensor, "*batch e"]) -> Tensor:
        """Normalize the last axis."""
        weight = self.weight.to(x.dtype)
        if self.offset is None:
            return F.rms_norm(x, x.shape[-1:], weight, eps=RMS_EPS).to(x.dtype)  # autocast returns float32
        return torch.addcmul(self.offset.to(x.dtype), F.rms_norm(x, x.shape[-1:], eps=RMS_EPS).to(x.dtype), weight)


class FullWidthRMSNorm(nn.Module):
    """RMS norm over all heads together, with a learned scale (layout of Wan)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "B N H e"]) -> Tensor:
        """Normalize the last two axes together."""
        flat = x.flatten(2)
        y = F.rms_norm(flat, flat.shape[-1:], self.weight.to(x.dtype), eps=RMS_EPS).to(x.dtype)
        return split_heads(y, x.shape[3])


def query_key_norm(config: ModelConfig, heads: int, *, offset: bool = False) -> nn.Module:
    """Build the norm of queries or keys in the layout of ``config``."""
    if config.layout == "wan":
        return FullWidthRMSNorm(heads * config.head_dim)
    return PerHeadRMSNorm(config.head_dim, offset=offset)


class CrossModalBias(nn.Module):
    """Bias on the attention logits of queries of one branch to keys of the other, per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def forward(self) -> Float[Tensor, " H"]:
        """Return the bias."""
        return self.weight.clone()  # engines that shard weights free the parameter after this call


class ModulationTable(nn.Module):
    """Modulation of one block, added to the modulation that the blocks of a branch share."""

    def __init__(self, parts: int, dim: int) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(parts, dim))

    def forward(self, shared: Float[Tensor, "B K pd"]) -> Float[Tensor, "p B K d"]:
        """Add the table and split the modulation into its parts."""
        return shared.unflatten(-1, (self.parts, -1)).permute(2, 0, 1, 3) + self.weight[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Modulation:
    """Shift, scale (centered at 1) and gate of attention and feed-forward, each (B, R, 1, d)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Embedded conditions of one branch. Token 0 is a learned null token, so no softmax is empty.

    Captions have p tokens before their own: the null token, and in the layout of Wan a padding token.
    """

    caption: Float[Tensor, "B p+L d"]
    caption_mask: Float[Tensor, "B 1 1 p+L"]  # added to logits
    words: Float[Tensor, "B 1+W d"]
    words_mask: Float[Tensor, "B 1 N 1+W"]  # added to logits: words near the time of each token
    words_rotation: Rotation  # W words
    token_rotation: Rotation  # N tokens


@dataclass(frozen=True, kw_only=True)
class TextKeyValues:
    """Keys and values of the conditions in one block, independent of the noise level."""

    caption: KeyValue
    words: KeyValue


class TextAttention(nn.Module):
    """Cross-attention to the caption (no positions) and to the timestamped transcript."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.head_dim = config.dim, config.head_dim
        transcript_width = config.transcript_heads * config.head_dim
        self.widths = [dim, transcript_width]
        self.query = nn.Linear(dim, dim + transcript_width)
        self.caption = nn.Linear(dim, 2 * dim)
        self.words = nn.Linear(dim, 2 * transcript_width)
        self.norm_caption_q, self.norm_caption_k = (query_key_norm(config, config.heads) for _ in range(2))
        self.norm_words_q, self.norm_words_k = (PerHeadRMSNorm(config.head_dim, offset=True) for _ in range(2))
        self.out = nn.Linear(dim + transcript_width, dim)

    def project_caption(self, caption: Float[Tensor, "B p+L d"]) -> KeyValue:
        """Return keys and values of the caption tokens."""
        k, v = rearrange(self.caption(caption), KEYS_VALUES, two=2, e=self.head_dim)
        return KeyValue(transpose_heads(self.norm_caption_k(k)), transpose_heads(v))

    def project_text(self, text: TextTokens, caption: KeyValue | None = None) -> TextKeyValues:
        """Return keys and values of caption and transcript. ``caption``: result of ``project_caption`` if cached."""
        k, v = rearrange(self.words(text.words), KEYS_VALUES, two=2, e=self.head_dim)
        # the null token has no time: a zero key gives the same logit at any position
        k = F.pad(rotate(self.norm_words_k(k[:, 1:]), text.words_rotation), (0, 0, 0, 0, 1, 0))
        words = KeyValue(transpose_heads(k), transpose_heads(v))
        return TextKeyValues(caption=caption or self.project_caption(text.caption), words=words)

    def forward(self, x: Float[Tensor, "B N d"], text: TextTokens, text_keys: TextKeyValues) -> Float[Tensor, "B N d"]:
        """Attend to caption and transcript."""
        caption_query, words_query = (split_heads(q, self.head_dim) for q in self.query(x).split(self.widths, dim=-1))
        caption_query = transpose_heads(self.norm_caption_q(caption_query))
        words_query = transpose_heads(rotate(self.norm_words_q(words_query), text.token_rotation))
        from_caption = attend(caption_query, text_keys.caption.k, text_keys.caption.v, text.caption_mask)
        from_words = attend(words_query, text_keys.words.k, text_keys.words.v, text.words_mask)
        return self.out(torch.cat([merge_heads(from_caption), merge_heads(from_words)], dim=-1))


def modulate(
    x: Float[Tensor, "B N d"], shift: Float[Tensor, "B R 1 d"], scale: Float[Tensor, "B R 1 d"], *, eps: float
) -> Float[Tensor, "B N d"]:
    """Apply layer norm without weights, then the scale (centered at 1) and shift of the noise level."""
    y = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, y, scale).flatten(1, 2)


def gated(
    x: Float[Tensor, "B N d"], gate: Float[Tensor, "B R 1 d"], y: Float[Tensor, "B N d"]
) -> Float[Tensor, "B N d"]:
    """Return x + gate y."""
    runs = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, runs), gate, y.unflatten(1, runs)).flatten(1, 2)


class Block(nn.Module):
    """Self-attention projections, text attention and feed-forward of one branch in one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.head_dim, self.eps = config.dim, config.head_dim, config.layer_norm_eps
        keys = config.key_heads * config.head_dim
        self.widths = [dim, keys, keys]
        self.table = ModulationTable(6, dim)
        self.qkv = nn.Linear(dim, dim + 2 * keys)
        self.norm_q, self.norm_k = (
            query_key_norm(config, heads, offset=config.local_start) for heads in (config.heads, config.key_heads)
        )
        self.cross_bias = CrossModalBias(config.heads) if config.has_cross_bias else None
        self.out = nn.Linear(dim, dim)
        self.norm_text = nn.LayerNorm(dim, eps=self.eps)
        self.text = TextAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_width), nn.GELU(approximate="tanh"), nn.Linear(config.mlp_width, dim)
        )

    def modulation(self, shared: Float[Tensor, "B K pd"], chunk: Tensor | None) -> Modulation:
        """Return the modulation per run. ``chunk``: chunk of each token; None if all chunks have equally many."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.table(shared)
        parts = (shift, 1 + scale, gate, mlp_shift, 1 + mlp_scale, mlp_gate)
        runs = [(p if chunk is None else p.index_select(1, chunk))[:, :, None] for p in parts]
        return Modulation(
            shift=runs[0], scale=runs[1], gate=runs[2], mlp_shift=runs[3], mlp_scale=runs[4], mlp_gate=runs[5]
        )

    def project(self, x: Float[Tensor, "B N d"], mod: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, N, H, e), normed unrotated keys and values (both B, N, G, e)."""
        qkv = self.qkv(modulate(x, mod.shift, mod.scale, eps=self.eps))
        q, k, v = (split_heads(part, self.head_dim) for part in qkv.split(self.widths, dim=-1))
        return self.norm_q(q), self.norm_k(k), v

    def update(
        self,
        x: Float[Tensor, "B N d"],
        attended: Float[Tensor, "B H N e"],
        mod: Modulation,
        *,
        text: TextTokens,
        text_keys: TextKeyValues | None,
    ) -> Tensor:
        """Apply the residual updates: attention output, text attention, feed-forward. ``text_keys``: if cached."""
        merged = merge_heads(attended).contiguous()  # only for contiguous input the bias is fused
        x = gated(x, mod.gate, self.out(merged))
        x = x + self.text(self.norm_text(x), text, text_keys or self.text.project_text(text))
        return gated(x, mod.mlp_gate, self.mlp(modulate(x, mod.mlp_shift, mod.mlp_scale, eps=self.eps)))
