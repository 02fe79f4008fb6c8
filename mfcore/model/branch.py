"""What one modality brings: latents to tokens and back, its conditions, its noise-level embedding, its blocks.

Letters: B batch, n latents, C channels, h w latent size, N tokens, K chunks, d width.
"""

import math
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mfcore.device import to_device_of
from mfcore.model.attention import additive_mask
from mfcore.model.block import Block, TextTokens, modulate
from mfcore.model.caption_cache import CachedCaption, tensor_versions
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.kv_cache import TokenPositions
from mfcore.model.rope import rotation, time_angles
from mfcore.types import Condition, Stream

DURATION_FEATURES = 128  # of the length of a word
Span = tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]
"""Levels t and r of a call."""
NOISE_SCALE = 1000.0  # noise levels in [0, 1] are embedded like the integer steps 0..1000
DURATION_SCALE = 100.0
PHASE_FREQUENCIES = 4  # waves per chunk, 1 to this many, that tell where in it a latent starts
FEW_WORDS = 32  # of a transcript that is read whole by every pass


def fourier_features(x: Float[Tensor, "*batch"], scale: float, features: int) -> Float[Tensor, "*batch f"]:
    """Cosines and sines of x * scale at log-spaced frequencies, always float32: bf16 would blur t - r (METHOD 2)."""
    phase = x.float()[..., None] * scale * _frequencies(features // 2, x.device)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


@cache
@torch.inference_mode(False)  # made where nothing is trained, it would be no constant where something is
def _frequencies(count: int, device: torch.device) -> Tensor:
    return torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float32, device=device) / count)


def _mlp(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


class OutputTable(nn.Module):
    """Shift and scale of the output: the embedded level plus a learned row for each (Wan's layout)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, dim))

    def forward(self, e: Float[Tensor, "B K d"]) -> Float[Tensor, "B K 2d"]:
        return torch.cat([e + self.weight[0], e + self.weight[1]], dim=-1)


class LevelEmbedding(nn.Module):
    """Noise level t, interval t - r (gated: r = t is the multi-step network exactly and for ever), and trust label."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.features, self.wan = config.dim, config.level_features, config.layout == "wan"
        self.level = _mlp(self.features, dim)
        self.interval = _mlp(self.features, dim)
        self.trust = _mlp(self.features, dim)
        self.shared = nn.Linear(dim, 6 * dim)
        self.final = OutputTable(dim) if self.wan else nn.Linear(dim, 2 * dim)

    def forward(
        self, t: Float[Tensor, "B K"], r: Float[Tensor, "B K"], trust: Float[Tensor, " B"] | None
    ) -> tuple[Tensor, Tensor]:
        """Modulation shared by all blocks (B, K, 6 d), and that of the output (B, K, 2 d)."""
        # METHOD 2: e = 1[t > r] MLP(feat(t - r)), last layer zero at the start
        e = self.level(self._features(t))
        e = e + (t > r)[..., None] * self.interval(self._features(t - r))
        if trust is not None:
            # s = 0 is real history and must change nothing, whatever was learned
            e = e + ((trust > 0)[:, None] * self.trust(self._features(trust)))[:, None]
        active = torch.nn.functional.silu(e)
        return self.shared(active), self.final(e if self.wan else active)

    def _features(self, level: Tensor) -> Tensor:
        return fourier_features(level, NOISE_SCALE, self.features)


class TextInput(nn.Module):
    """Caption and transcript embeddings to the branch's width, each preceded by a learned "nothing here" token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, wan = config.dim, config.layout == "wan"
        self.caption = nn.Linear(config.text_dim, dim)
        self.refine = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(dim, dim)) if wan else nn.Identity()
        self.words = nn.Linear(config.text_dim + DURATION_FEATURES, dim)
        self.nothing = nn.Embedding(2, dim)

    def forward(
        self, cond: Condition, caption: Float[Tensor, "B 1+L d"] | None = None
    ) -> tuple[Float[Tensor, "B 1+L d"], Float[Tensor, "B 1+W d"]]:
        """``caption``: its tokens, if known."""
        seconds = (cond.word_times[..., 1] - cond.word_times[..., 0]).float()
        lengths = fourier_features(seconds, DURATION_SCALE, DURATION_FEATURES).to(cond.words.dtype)
        words = self.words(torch.cat([cond.words, lengths], dim=-1))
        return self.embed_caption(cond.caption) if caption is None else caption, self._after_nothing(1, words)

    def embed_caption(self, caption: Float[Tensor, "B L D"]) -> Float[Tensor, "B 1+L d"]:
        """The caption's tokens."""
        return self._after_nothing(0, self.refine(self.caption(caption)))

    def _after_nothing(self, which: int, tokens: Float[Tensor, "B L d"]) -> Float[Tensor, "B 1+L d"]:
        nothing = self.nothing(torch.arange(2, device=tokens.device))[which]
        return torch.cat([nothing.expand(tokens.shape[0], 1, -1), tokens], dim=1)


class Branch(nn.Module):
    """One modality of the network."""

    def __init__(self, model: ModelConfig, config: BranchConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.embed = nn.Linear(config.width, model.dim)
        self.embed_sink = nn.Linear(
            config.width, model.dim
        )  # first frame or voice: coded apart from the latents that follow
        self.absent = nn.Embedding(1, model.dim)  # stands for a reference voice that is not given
        self.levels = LevelEmbedding(model)
        self.text = TextInput(model)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.head = nn.Linear(model.dim, config.width)
        self.phase = nn.Linear(2 * PHASE_FREQUENCIES, model.dim, bias=False) if model.chunk_phase else None
        if config.anchor:
            self.anchor = nn.Embedding(1, config.anchor)  # share of the first frame that stays, per channel

    def block(self, layer: int) -> Block:
        return cast(Block, self.blocks[layer])

    def patchify(self, stream: Stream) -> Float[Tensor, "B N p"]:
        """Latents cut into tokens."""
        x = stream.latents if stream.latents.ndim == 5 else stream.latents[..., None, None]
        (p, q), (h, w) = self.config.patch, self.config.grid
        return rearrange(x, "b n c (h p) (w q) -> b (n h w) (c p q)", p=p, q=q, h=h, w=w)

    def unpatchify(self, tokens: Float[Tensor, "B N p"], like: Tensor) -> Tensor:
        """Inverse of ``patches``, in the shape of ``like``."""
        (p, q), (h, w) = self.config.patch, self.config.grid
        x = rearrange(tokens, "b (n h w) (c p q) -> b n c (h p) (w q)", p=p, q=q, h=h, w=w)
        return x.reshape(like.shape)

    def embed_tokens(self, stream: Stream, mine: slice, phases: Float[Tensor, "N 2p"] | None) -> Float[Tensor, "B N d"]:
        """The ``mine`` among its tokens, embedded; ``phases`` of these, where the network has them."""
        tokens = self.embed(self.patchify(stream)[:, mine])
        return tokens if self.phase is None or phases is None else tokens + self.phase(phases)

    def phases(self, at: TokenPositions, like: Tensor) -> Float[Tensor, "N 2p"]:
        """How far into its chunk each token starts: cosines and sines of 1, 2 .. whole waves per chunk, from float64.

        The first latents of a chunk are nearer to what is known than its last ones, and vary less given it.
        """
        chunks = at.times / self.model.chunk_seconds
        turns = 2 * math.pi * chunks[:, None] * torch.arange(1, PHASE_FREQUENCIES + 1, dtype=torch.float64)
        return to_device_of(torch.cat([turns.cos(), turns.sin()], dim=-1), like, like.dtype)

    def positions(self, stream: Stream, branch: int) -> TokenPositions:
        """Where each token of the stream stands."""
        (h, w), n = self.config.grid, stream.times.shape[0]
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        return TokenPositions(
            chunk=stream.chunk.repeat_interleave(h * w),
            times=stream.times.repeat_interleave(h * w),
            ys=ys.flatten().repeat(n),
            xs=xs.flatten().repeat(n),
            branch=torch.full((n * h * w,), branch),
        )

    def sink_tokens(self, stream: Stream, present: Bool[Tensor, " B"] | None) -> Float[Tensor, "B N d"]:
        """Tokens of the first frame or of the reference voice; rows without one get the learned stand-in."""
        tokens = self.embed_sink(self.patchify(stream))
        if present is None:
            return tokens
        absent = self.absent(torch.zeros((), dtype=torch.long, device=tokens.device))
        return torch.where(present[:, None, None], tokens, absent.to(tokens.dtype))

    def cached_caption(self, caption: Float[Tensor, "B L D"], kept: CachedCaption | None) -> CachedCaption:
        """What a stream keeps of a caption: ``kept``, if that is made of the same caption and weights."""
        layers = [self.block(layer).text for layer in range(self.model.layers)]
        read = (self.text, *(part for text in layers for part in (text.caption, text.norm_caption_k)))
        now = tensor_versions([caption, *(weight for part in read for weight in part.parameters())])
        if kept and kept.origin.is_current(now):
            return kept
        tokens = self.text.embed_caption(caption)
        return CachedCaption(tokens=tokens, layers=[text.project_caption(tokens) for text in layers], origin=now)

    def text_tokens(
        self, cond: Condition, at: TokenPositions, *, silent: bool, caption: CachedCaption | None = None
    ) -> TextTokens:
        """Embedded conditions for tokens at ``at``. ``silent``: the sink reads none, it outlives their change.

        ``caption``: that of ``cond``, if it is kept.
        """
        cond = self._heard(cond, at)
        about, words = self.text(cond, caption.tokens if caption else None)
        device = about.device
        one = torch.ones(about.shape[0], 1, dtype=torch.bool, device=device)
        seen = cond.caption_mask & (not silent)
        # Wan's weights know no such token beside a caption
        alone = ~seen.any(1, keepdim=True) if self.model.layout == "wan" else one
        middle = cond.word_times.mean(-1)
        gap = (middle[:, None, :] - to_device_of(at.times, middle)[None, :, None]).abs()
        near = (gap <= self.model.word_horizon_seconds) & cond.words_mask[:, None, :] & (not silent)
        return TextTokens(
            caption=about,
            caption_mask=additive_mask(torch.cat([alone, seen], dim=1)[:, None, None]),
            words=words,
            words_mask=additive_mask(torch.cat([one[:, None].expand(-1, len(at), -1), near], dim=2)[:, None]),
            words_turn=rotation(time_angles(middle, self.model)[:, :, None], words),
            token_turn=rotation(time_angles(at.times, self.model)[:, None], words),
        )

    def _heard(self, cond: Condition, at: TokenPositions) -> Condition:
        """Without the words of a long transcript that no token at ``at`` can reach: the cost of a chunk does not grow
        with what is said before and after it."""
        if cond.words.shape[1] <= FEW_WORDS:
            return cond
        middle, reach = cond.word_times.mean(-1), self.model.word_horizon_seconds
        first, last = float(at.times.min()) - reach, float(at.times.max()) + reach
        keep = ((middle >= first) & (middle <= last) & cond.words_mask).any(0).nonzero()[:, 0]
        return replace(
            cond,
            words=cond.words[:, keep],
            words_mask=cond.words_mask[:, keep],
            word_times=cond.word_times[:, keep],
        )

    def velocity(
        self,
        x: Float[Tensor, "B N d"],
        final: Float[Tensor, "B K pd"],
        chunk: Tensor,
        runs: Tensor | None,
        noisy: Tensor,
        span: Span,
        first: Float[Tensor, "B C h w"] | None,
    ) -> Tensor:
        """Tokens to velocities, in float32: the flow of a Gaussian of spread ``data_std``, plus a scaled correction F.

        A token may be wider than the network: what is white in it, and what stays as in the first frame, need not be
        carried through. ``chunk``: of each token; ``runs``: the same, None where all chunks hold as many tokens.
        ``span``: t and r. ``first``: the first frame, which the Gaussian has its mean from.
        """
        shift, scale = (part if runs is None else part[:, runs] for part in final.float()[:, :, None].chunk(2, dim=-1))
        with torch.autocast(x.device.type, enabled=False):
            correction = self.unpatchify(self.head(modulate(x.float(), shift, 1 + scale)), noisy)
        if self.config.data_std is None:
            return correction
        per_latent = chunk[:: self.config.tokens]
        t, r = (level.float()[:, per_latent].reshape(-1, len(per_latent), *(1,) * (noisy.ndim - 2)) for level in span)
        gain, spread = gaussian_flow(t, r, self.config.data_std)
        mean, noisy = self.anchor_mean(first), noisy.float()
        base = gain * noisy if mean is None else gain * (noisy - (1 - t) * mean) - mean
        return torch.addcmul(base, spread, correction)

    def anchor_mean(self, first: Float[Tensor, "B C h w"] | None) -> Tensor | None:
        """What is known of every latent before the network looks: anchored channels of the first frame; None: 0."""
        if not self.config.anchor or first is None:
            return None
        share = self.anchor(torch.zeros((), dtype=torch.long, device=first.device)).float()
        share = torch.nn.functional.pad(share, (0, self.config.channels - self.config.anchor))
        return (first.float() * share[:, None, None])[:, None]


def gaussian_flow(t: Tensor, r: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """What multiplies x_t in the average velocity of N(0, s^2) from t to r (r = t: TRUTHS, exact property 2), and
    s / sqrt(D_t), the spread of the velocity about its mean given x_t.

    About a mean m the flow is the same in x_t - (1 - t) m, and m moves by -m per unit of level.

    From x_r = sqrt(D_r / D_t) x_t with D_t = (1 - t)^2 s^2 + t^2, written so that nothing is divided by t - r:
    ((1 + s^2) (t + r) - 2 s^2) / (sqrt(D_t) (sqrt(D_t) + sqrt(D_r))).
    """
    variance, level = std**2, torch.stack([t, r])
    top, bottom = ((1 - level) ** 2 * variance + level**2).sqrt()
    return ((1 + variance) * (t + r) - 2 * variance) / (top * (top + bottom)), std / top
