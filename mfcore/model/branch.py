"""One modality of the network: latents to tokens and back, conditions, noise-level embedding, blocks.

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

DURATION_FEATURES = 128  # features of the duration of a word
NOISE_SCALE = 1000.0  # noise levels in [0, 1] are embedded like the integer steps 0..1000
DURATION_SCALE = 100.0
PHASE_FREQUENCIES = 4  # highest number of waves per chunk in the phase of a latent
FEW_WORDS = 32  # longest transcript that every pass reads as a whole
WAN_CAPTION_TOKENS = 512  # Wan attends to captions padded with zero vectors to this length


def fourier_features(x: Float[Tensor, "*batch"], scale: float, features: int) -> Float[Tensor, "*batch f"]:
    """Return cosines and sines of x * scale at log-spaced frequencies.

    Always float32: in bfloat16 a small t - r is lost (METHOD 2).
    """
    phase = x.float()[..., None] * scale * _frequencies(features // 2, x.device)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


@cache
@torch.inference_mode(False)  # a tensor created in inference mode could not be used in training
def _frequencies(count: int, device: torch.device) -> Tensor:
    return torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float32, device=device) / count)


def _mlp(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


class OutputTable(nn.Module):
    """Shift and scale of the output: the embedded level plus one learned row each (layout of Wan)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, dim))

    def forward(self, e: Float[Tensor, "B K d"]) -> Float[Tensor, "B K 2d"]:
        """Return shift and scale."""
        return torch.cat([e + self.weight[0], e + self.weight[1]], dim=-1)


class LevelEmbedding(nn.Module):
    """Embedding of noise level t, interval t - r and trust label.

    The interval is gated: at r = t the network always equals the multi-step network.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.features = config.level_features
        self.wan = config.layout == "wan"
        self.level = _mlp(self.features, dim)
        self.interval = _mlp(self.features, dim)
        self.trust = _mlp(self.features, dim)
        self.shared = nn.Linear(dim, 6 * dim)
        self.final = OutputTable(dim) if self.wan else nn.Linear(dim, 2 * dim)

    def forward(
        self, t: Float[Tensor, "B K"], r: Float[Tensor, "B K"], trust: Float[Tensor, " B"] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the modulation shared by all blocks (B, K, 6 d) and that of the output (B, K, 2 d)."""
        # METHOD 2: e = 1[t > r] MLP(feat(t - r)), last layer initialized with zeros
        e = self.level(self._features(t))
        e = e + (t > r)[..., None] * self.interval(self._features(t - r))
        if trust is not None:
            # s = 0 is real history: the label must have no effect, trained or not
            e = e + ((trust > 0)[:, None] * self.trust(self._features(trust)))[:, None]
        active = torch.nn.functional.silu(e)
        return self.shared(active), self.final(e if self.wan else active)

    def _features(self, level: Tensor) -> Tensor:
        return fourier_features(level, NOISE_SCALE, self.features)


class TextInput(nn.Module):
    """Projection of caption and transcript to the width of the branch, after a learned null token each.

    In the layout of Wan the null token of the caption is the empty prompt, and a padding token precedes the caption.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, wan = config.dim, config.layout == "wan"
        self.caption = nn.Linear(config.text_dim, dim)
        self.refine = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(dim, dim)) if wan else nn.Identity()
        self.words = nn.Linear(config.text_dim + DURATION_FEATURES, dim)
        self.nothing = nn.Embedding(2, dim)
        self.padding = config.caption_extra - 1

    def forward(
        self, cond: Condition, caption: Float[Tensor, "B p+L d"] | None = None
    ) -> tuple[Float[Tensor, "B p+L d"], Float[Tensor, "B 1+W d"]]:
        """Return the tokens of caption and transcript. ``caption``: cached tokens, if any."""
        seconds = (cond.word_times[..., 1] - cond.word_times[..., 0]).float()
        lengths = fourier_features(seconds, DURATION_SCALE, DURATION_FEATURES).to(cond.words.dtype)
        words = self.words(torch.cat([cond.words, lengths], dim=-1))
        return self.embed_caption(cond.caption) if caption is None else caption, self._prepend_null(1, words)

    def embed_caption(self, caption: Float[Tensor, "B L D"]) -> Float[Tensor, "B p+L d"]:
        """Return the tokens of a caption."""
        padded = torch.nn.functional.pad(caption, (0, 0, self.padding, 0))
        return self._prepend_null(0, self.refine(self.caption(padded)))

    def _prepend_null(self, index: int, tokens: Float[Tensor, "B L d"]) -> Float[Tensor, "B 1+L d"]:
        nothing = self.nothing(torch.arange(2, device=tokens.device))[index]
        return torch.cat([nothing.expand(tokens.shape[0], 1, -1), tokens], dim=1)


class Branch(nn.Module):
    """Branch of one modality."""

    def __init__(self, model: ModelConfig, config: BranchConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.embed = nn.Linear(config.width, model.dim)
        self.embed_sink = nn.Linear(config.width, model.dim)  # first frame or voice
        self.absent = nn.Embedding(1, model.dim)  # replaces a missing reference voice
        self.levels = LevelEmbedding(model)
        self.text = TextInput(model)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.head = nn.Linear(model.dim, config.width)
        self.phase = nn.Linear(2 * PHASE_FREQUENCIES, model.dim, bias=False) if model.chunk_phase else None
        if config.anchor:
            self.anchor = nn.Embedding(1, config.anchor)  # weight of the first frame, per channel
        if config.learned_std:
            self.log_std = nn.Embedding(config.channels, math.prod(config.size))  # log of the spread over data_std

    def block(self, layer: int) -> Block:
        """Return the block of ``layer``."""
        return cast(Block, self.blocks[layer])

    def patchify(self, stream: Stream) -> Float[Tensor, "B N p"]:
        """Cut latents into tokens."""
        x = stream.latents if stream.latents.ndim == 5 else stream.latents[..., None, None]
        (p, q), (h, w) = self.config.patch, self.config.grid
        return rearrange(x, "b n c (h p) (w q) -> b (n h w) (c p q)", p=p, q=q, h=h, w=w)

    def unpatchify(self, tokens: Float[Tensor, "B N p"], like: Tensor) -> Tensor:
        """Invert ``patchify``. The result has the shape of ``like``."""
        (p, q), (h, w) = self.config.patch, self.config.grid
        x = rearrange(tokens, "b (n h w) (c p q) -> b n c (h p) (w q)", p=p, q=q, h=h, w=w)
        return x.reshape(like.shape)

    def embed_tokens(self, stream: Stream, span: slice, phases: Float[Tensor, "N 2p"] | None) -> Float[Tensor, "B N d"]:
        """Embed the tokens in ``span``. ``phases``: of these tokens; None without chunk_phase."""
        tokens = self.embed(self.patchify(stream)[:, span])
        return tokens if self.phase is None or phases is None else tokens + self.phase(phases)

    def phases(self, positions: TokenPositions, like: Tensor) -> Float[Tensor, "N 2p"]:
        """Return the position of each token in its chunk: cosines and sines of 1, 2, ... waves per chunk.

        The first latents of a chunk are closer to the history than the last ones, so they vary less given it.
        """
        chunks = positions.times / self.model.chunk_seconds
        turns = 2 * math.pi * chunks[:, None] * torch.arange(1, PHASE_FREQUENCIES + 1, dtype=torch.float64)
        return to_device_of(torch.cat([turns.cos(), turns.sin()], dim=-1), like, like.dtype)

    def positions(self, stream: Stream, branch: int) -> TokenPositions:
        """Return the position of each token of ``stream``."""
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
        """Return the tokens of first frame or reference voice. Rows without a voice get a learned token."""
        tokens = self.embed_sink(self.patchify(stream))
        if present is None:
            return tokens
        absent = self.absent(torch.zeros((), dtype=torch.long, device=tokens.device))
        return torch.where(present[:, None, None], tokens, absent.to(tokens.dtype))

    def cached_caption(self, caption: Float[Tensor, "B L D"], previous: CachedCaption | None) -> CachedCaption:
        """Return ``previous`` if caption and weights are unchanged, else the keys and values of ``caption``."""
        layers = [self.block(layer).text for layer in range(self.model.layers)]
        modules: list[nn.Module] = [self.text]
        for text in layers:
            modules += [text.caption, text.norm_caption_k]
        weights = [weight for module in modules for weight in module.parameters()]
        versions = tensor_versions([caption, *weights])
        if previous and previous.versions.is_current(versions):
            return previous
        tokens = self.text.embed_caption(caption)
        return CachedCaption(tokens=tokens, layers=[text.project_caption(tokens) for text in layers], versions=versions)

    def text_tokens(
        self, cond: Condition, positions: TokenPositions, *, ignore_text: bool, caption: CachedCaption | None = None
    ) -> TextTokens:
        """Return the embedded conditions for the tokens at ``positions``.

        ``ignore_text`` is set for the sink, which must not depend on the text. ``caption``: cached caption of ``cond``.
        """
        cond = self._trim_transcript(cond, positions)
        tokens, words = self.text(cond, caption.tokens if caption else None)
        device = tokens.device
        visible = torch.ones(tokens.shape[0], 1, dtype=torch.bool, device=device)
        caption_mask = cond.caption_mask & (not ignore_text)
        extra_mask = additive_mask(visible)
        if self.model.layout == "wan":  # a caption or the empty prompt, then padding: n equal keys have the logit of
            length = caption_mask.sum(1, keepdim=True)  # one plus log n
            padding = (WAN_CAPTION_TOKENS - length.clamp_min(1)).clamp_min(0).log()
            extra_mask = torch.cat([additive_mask(length == 0), padding], dim=1)
        middle = cond.word_times.mean(-1)
        distance = (middle[:, None, :] - to_device_of(positions.times, middle)[None, :, None]).abs()
        near = (distance <= self.model.word_horizon_seconds) & cond.words_mask[:, None, :] & (not ignore_text)
        words_mask = torch.cat([visible[:, None].expand(-1, len(positions), -1), near], dim=2)
        return TextTokens(
            caption=tokens,
            caption_mask=torch.cat([extra_mask, additive_mask(caption_mask)], dim=1)[:, None, None],
            words=words,
            words_mask=additive_mask(words_mask[:, None]),
            words_rotation=rotation(time_angles(middle, self.model)[:, :, None], words),
            token_rotation=rotation(time_angles(positions.times, self.model)[:, None], words),
        )

    def _trim_transcript(self, cond: Condition, positions: TokenPositions) -> Condition:
        """Drop the words of a long transcript that no token at ``positions`` can reach.

        The cost of a chunk is then independent of the length of the transcript.
        """
        if cond.words.shape[1] <= FEW_WORDS:
            return cond
        middle = cond.word_times.mean(-1)
        reach = self.model.word_horizon_seconds
        first = float(positions.times.min()) - reach
        last = float(positions.times.max()) + reach
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
        *,
        final: Float[Tensor, "B K pd"],
        chunk_index: Tensor,
        level_index: Tensor | None,
        noisy: Tensor,
        t: Float[Tensor, "B K"],
        r: Float[Tensor, "B K"],
        first_frame: Float[Tensor, "B C h w"] | None,
    ) -> Tensor:
        """Return velocities in float32: the flow of N(m, data_std^2) plus a scaled correction F of the tokens.

        The network need not represent white noise or the first frame, so a token may be wider than the network.

        ``chunk_index``: chunk of each token; ``level_index``: the same, or None if all chunks have equally many tokens.
        ``noisy``: input latents. ``first_frame``: gives the mean m of anchored channels; None: m = 0.
        """
        shift, scale = final.float()[:, :, None].chunk(2, dim=-1)
        if level_index is not None:
            shift, scale = shift[:, level_index], scale[:, level_index]
        with torch.autocast(x.device.type, enabled=False):
            correction = self.unpatchify(
                self.head(modulate(x.float(), shift, 1 + scale, eps=self.model.layer_norm_eps)), noisy
            )
        if self.config.data_std is None:
            return correction
        per_latent = chunk_index[:: self.config.tokens]
        shape = (*t.shape, *(1,) * (noisy.ndim - 2))
        t, r = t.float().reshape(shape), r.float().reshape(shape)
        gain, spread = (x[:, per_latent] for x in gaussian_flow(t, r, self.data_std(noisy)))
        t = t[:, per_latent]
        mean = self.anchor_mean(first_frame)
        noisy = noisy.float()
        base = gain * noisy if mean is None else gain * (noisy - (1 - t) * mean) - mean
        return torch.addcmul(base, spread, correction)

    def data_std(self, noisy: Tensor) -> Tensor | float:
        """Return the spread of latents around their mean, broadcastable to ``noisy`` (B, n, C, ...)."""
        std = self.config.data_std
        assert std is not None
        if not self.config.learned_std:
            return std
        # Measured spreads of a whitened video latent range from 0.005 to 2.7. With one value, noise of that spread
        # remains where the true one is smaller, because the tokens are wider than the network.
        ratio = self.log_std(torch.arange(self.config.channels, device=noisy.device)).float().exp()
        return std * ratio.reshape(noisy.shape[2:])

    def anchor_mean(self, first_frame: Float[Tensor, "B C h w"] | None) -> Tensor | None:
        """Return the mean m of the latents: anchored channels of the first frame. None means 0."""
        if not self.config.anchor or first_frame is None:
            return None
        share = self.anchor(torch.zeros((), dtype=torch.long, device=first_frame.device)).float()
        share = torch.nn.functional.pad(share, (0, self.config.channels - self.config.anchor))
        return (first_frame.float() * share[:, None, None])[:, None]


def gaussian_flow(t: Tensor, r: Tensor, std: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return g(t, r) and s / sqrt(D_t): factor of x_t in the average velocity of N(0, s^2), and spread given x_t.

    With a mean m the flow is the same in x_t - (1 - t) m, and m moves by -m per unit of level.

    From x_r = sqrt(D_r / D_t) x_t with D_t = (1 - t)^2 s^2 + t^2, written without a division by t - r:
    ((1 + s^2) (t + r) - 2 s^2) / (sqrt(D_t) (sqrt(D_t) + sqrt(D_r))).
    """
    variance = std**2
    top, bottom = (((1 - level) ** 2 * variance + level**2).sqrt() for level in (t, r))
    return ((1 + variance) * (t + r) - 2 * variance) / (top * (top + bottom)), std / top
