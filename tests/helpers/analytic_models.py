"""Velocity models whose every answer is known in closed form, and the linear-Gaussian world of exposure bias.

Letters: B batch, K chunks, n latents, C channels. Data N(mean, variance) under ``x_t = (1 - t) x_0 + t eps`` has
``x_t ~ N((1 - t) mean, D)`` with ``D = (1 - t)^2 variance + t^2``; its probability flow keeps the quantile of x_t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mfcore.flow import expand_levels
from mfcore.types import AUDIO, AVBatch, Condition, NoiseLevels, Stream, Streams


def spread(variance, t):
    """Variance of x_t: D = (1 - t)^2 variance + t^2."""
    return (1 - t) ** 2 * variance + t**2


def instantaneous(x, t, mean, variance):
    """v = lam (x - (1 - t) mean) - mean, lam = (t - (1 - t) variance) / D."""
    lam = (t - (1 - t) * variance) / spread(variance, t)
    return lam * (x - (1 - t) * mean) - mean


def flow_map(x, t, r, mean, variance):
    """Where the flow carries x_t: the same quantile of x_r."""
    return (1 - r) * mean + (spread(variance, r) / spread(variance, t)) ** 0.5 * (x - (1 - t) * mean)


def average(x, t, r, mean, variance):
    """u = (x_t - x_r) / (t - r), and v where r = t."""
    moved = (x - flow_map(x, t, r, mean, variance)) / torch.where(t > r, t - r, 1.0)
    return torch.where(t > r, moved, instantaneous(x, t, mean, variance))


def condition(rows: int, *, caption: bool = True, voice: Tensor | None = None) -> Condition:
    """One caption token, which a model reads as "conditional", and optionally clean latents before time 0."""
    return Condition(
        caption=torch.zeros(rows, 1, 1),
        caption_mask=torch.full((rows, 1), caption),
        words=torch.zeros(rows, 1, 1),
        words_mask=torch.zeros(rows, 1, dtype=torch.bool),
        word_times=torch.zeros(rows, 1, 2, dtype=torch.float64),
        first_frame=None,
        voice=voice,
        voice_mask=None if voice is None else torch.ones(rows, dtype=torch.bool),
    )


def stream(latents: Tensor, first: int = 0) -> Stream:
    """Latents (B, K, ...), one per chunk of half a second, from chunk ``first`` on."""
    chunk = torch.arange(first, first + latents.shape[1])
    return Stream(latents=latents, times=chunk.double() / 2, chunk=chunk)


@dataclass(frozen=True)
class Nothing:
    """The memory of a model that needs none."""

    def detach(self):
        return self

    def rows(self, index):
        return self

    @classmethod
    def stack(cls, parts):
        return parts[0]

    def evict_before(self, chunk):
        return self

    def shared_passes(self):
        return self


@dataclass(frozen=True, kw_only=True)
class GaussianModel:
    """Every element N(mean, std^2) given a caption, N(null_mean, null_std^2) without. Knows no history.

    ``flow_map`` False: the network has no few-step mode and answers with the instantaneous velocity whatever r is.
    """

    mean: float | Tensor = 0.0
    std: float = 1.0
    null_mean: float = 0.0
    null_std: float = 1.0
    scale: dict[str, float] = field(default_factory=dict)  # modality -> factor on all of the above; absent: 1
    flow_map: bool = True

    def __call__(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ):
        given = cond.caption_mask.any(dim=1)
        return {m: self._velocity(m, s, t[m], r[m], given) for m, s in x.items()}, cache or Nothing()

    def _velocity(self, m: str, s: Stream, t: Tensor, r: Tensor, given: Tensor) -> Tensor:
        size = self.scale.get(m, 1.0)
        t, r = (expand_levels(level, s.chunk, s.latents) for level in (t, r if self.flow_map else t))
        given = given.reshape(-1, *(1,) * (s.latents.ndim - 1))
        mean = torch.where(given, torch.as_tensor(self.mean), self.null_mean) * size
        std = torch.where(given, self.std, self.null_std) * size
        return average(s.latents, t, r, mean.to(s.latents), std.to(s.latents) ** 2)


@dataclass(frozen=True, kw_only=True)
class Past:
    """The chunks that a LinearGaussian remembers, (B, chunks, C) per modality; the latest number is ``last``."""

    latents: dict[str, Tensor]
    last: int

    def before(self, m: str, s: Stream) -> Tensor:
        """The chunk before each chunk of ``s``."""
        held = self.latents[m]
        return held[:, s.chunk - 1 - (self.last - held.shape[1] + 1)]

    def append(self, x: Streams) -> "Past":
        joined = {m: torch.cat([self.latents[m], s.latents], dim=1) for m, s in x.items()}
        return Past(latents=joined, last=int(next(iter(x.values())).chunk[-1])) if x else self

    def detach(self) -> "Past":
        return replace(self, latents={m: v.detach() for m, v in self.latents.items()})

    def shared_passes(self) -> "Past":
        return self

    def rows(self, index: Tensor) -> "Past":
        return replace(self, latents={m: v[index] for m, v in self.latents.items()})

    @classmethod
    def stack(cls, parts: Sequence["Past"]) -> "Past":
        joined = {m: torch.cat([p.latents[m] for p in parts]) for m in parts[0].latents}
        return replace(parts[0], latents=joined)

    def evict_before(self, chunk: int) -> "Past":
        keep = self.last - (chunk - 1) + 1
        return replace(self, latents={m: v[:, -keep:] for m, v in self.latents.items()})


class LinearGaussian(nn.Module):
    """next chunk ~ N(alpha h + delta, v), h the chunk before; chunk 0 continues ``cond.voice``.

    delta is frozen: a capacity error. Both modes are exact, the few-step one by the flow map.
    """

    def __init__(self, alpha: float, delta: float, v: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.log_v = nn.Parameter(torch.tensor(math.log(v)))
        self.delta = delta

    @property
    def v(self) -> Tensor:
        return self.log_v.exp()

    def forward(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ):
        past = cache or Past(latents={AUDIO: cond.voice}, last=-1)
        if store:
            return {}, past.append(x)
        return {m: self._velocity(s, t[m], r[m], past.before(m, s)) for m, s in x.items()}, past

    def _velocity(self, s: Stream, t: Tensor, r: Tensor, h: Tensor) -> Tensor:
        t, r = (expand_levels(level, s.chunk, s.latents) for level in (t, r))
        return average(s.latents, t, r, self.alpha * h + self.delta, self.v)


PERSISTENCE = 0.95  # x_k = a x_{k-1} + sqrt(1 - a^2) w_k
BIAS = 0.05  # delta
CHUNKS = 16  # numbers per clip; the first is given, as a first frame is


def linear_clips(rows: int, channels: int, number: int, chunks: int = CHUNKS) -> AVBatch:
    """Batch ``number`` of the world, ``channels`` copies of it per row; a clip's first number is its condition."""
    draw = torch.Generator().manual_seed(number)
    x = [torch.randn(rows, 1, channels, generator=draw)]
    for _ in range(chunks - 1):
        w = torch.randn(rows, 1, channels, generator=draw)
        x.append(PERSISTENCE * x[-1] + math.sqrt(1 - PERSISTENCE**2) * w)
    return AVBatch(
        streams={AUDIO: stream(torch.cat(x[1:], dim=1))},
        cond=condition(rows, voice=x[0]),
        samples=torch.arange(rows) + rows * number,
    )


def coupled_fixed_point(s: float) -> tuple[float, float]:
    """(alpha, v) that flow matching on coupled history of strength s settles at: the recursion of TRUTHS.md."""
    a, delta = PERSISTENCE, BIAS
    alpha, v = a, 1 - a**2
    for _ in range(200):
        d = spread(v, s)
        kappa, eta = (1 - s) * math.sqrt(v / d), s * math.sqrt(v / d)
        m, c, p = 0.0, 1.0, 1.0
        rows: list[tuple[float, float, float]] = []
        for _ in range(CHUNKS - 1):
            rows.append((m, c, p))
            p = (
                (1 - kappa) ** 2 * (alpha**2 * p + 2 * alpha * delta * m + delta**2)
                + kappa**2
                + eta**2
                + 2 * kappa * (1 - kappa) * alpha * a * c
            )
            m, c = (1 - kappa) * (alpha * m + delta), (1 - kappa) * alpha * a * c + kappa
        ms, cs, ps = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        alpha = (a * cs - delta * ms) / ps
        v = 1 - 2 * alpha * a * cs + alpha**2 * ps + 2 * alpha * delta * ms + delta**2
    return alpha, v


def self_forced_fixed_point() -> tuple[float, float]:
    """(alpha, v) of DMD on its own endless roll-out, teacher exact: E h ((alpha - a) h + delta) = 0, v = 1 - a^2."""
    a, delta, v = PERSISTENCE, BIAS, 1 - PERSISTENCE**2
    alpha = a
    for _ in range(200):
        mean = delta / (1 - alpha)
        alpha = a - delta * mean / (v / (1 - alpha**2) + mean**2)
    return alpha, v


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What a chunk model does when it runs on its own output."""

    drift: float  # mean at k = 64
    lag1: float  # correlation of neighbouring chunks
    seam: float  # E (h_k - h_{k-1})^2 / (2 (1 - a)): 1 in the data
    kl: float  # of a stationary pair of neighbours, model to truth


def behaviour(alpha: float, v: float, delta: float = BIAS) -> Behaviour:
    """Closed forms for h_k = alpha h_{k-1} + delta + sqrt(v) w_k."""
    a, variance, mean = PERSISTENCE, v / (1 - alpha**2), delta / (1 - alpha)
    own = variance * torch.tensor([[1, alpha], [alpha, 1]], dtype=torch.float64)
    truth = torch.tensor([[1, a], [a, 1]], dtype=torch.float64)
    shift = torch.full((2,), mean, dtype=torch.float64)
    pair = torch.distributions.MultivariateNormal(shift, own)
    kl = torch.distributions.kl_divergence(pair, torch.distributions.MultivariateNormal(0 * shift, truth))
    return Behaviour(
        drift=mean * (1 - alpha**64),
        lag1=alpha,
        seam=((alpha - 1) ** 2 * variance + v) / (2 * (1 - a)),
        kl=float(kl),
    )
