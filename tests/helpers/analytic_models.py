"""Velocity models with closed forms, and the linear-Gaussian world of exposure bias.

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
    """Return the variance of x_t, D = (1 - t)^2 variance + t^2."""
    return (1 - t) ** 2 * variance + t**2


def instantaneous_velocity(x, t, *, mean, variance):
    """Return v = lam (x - (1 - t) mean) - mean, lam = (t - (1 - t) variance) / D."""
    lam = (t - (1 - t) * variance) / spread(variance, t)
    return lam * (x - (1 - t) * mean) - mean


def flow_map(x, t, r, *, mean, variance):
    """Return x_r, which has the quantile of x_t."""
    return (1 - r) * mean + (spread(variance, r) / spread(variance, t)) ** 0.5 * (x - (1 - t) * mean)


def average_velocity(x, t, r, *, mean, variance):
    """Return u = (x_t - x_r) / (t - r), or v where r = t."""
    u = (x - flow_map(x, t, r, mean=mean, variance=variance)) / torch.where(t > r, t - r, 1.0)
    return torch.where(t > r, u, instantaneous_velocity(x, t, mean=mean, variance=variance))


def condition(rows: int, *, caption: bool = True, voice: Tensor | None = None) -> Condition:
    """Return a condition with one caption token, which marks it as conditional, and optional voice latents."""
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
    """Return a stream of latents (B, K, ...), one per chunk of 0.5 s, from chunk ``first`` on."""
    chunk = torch.arange(first, first + latents.shape[1])
    return Stream(latents=latents, times=chunk.double() / 2, chunk=chunk)


@dataclass(frozen=True)
class EmptyCache:
    """Cache of a model without history."""

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
    """Model of elements N(mean, std^2) given a caption, N(null_mean, null_std^2) without, independent of history.

    Without ``flow_map`` the few-step mode is missing: the velocity is instantaneous for any r.
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
        return {m: self._velocity(m, s, t[m], r[m], given) for m, s in x.items()}, cache or EmptyCache()

    def _velocity(self, m: str, s: Stream, t: Tensor, r: Tensor, given: Tensor) -> Tensor:
        size = self.scale.get(m, 1.0)
        t, r = (expand_levels(level, s.chunk, s.latents) for level in (t, r if self.flow_map else t))
        given = given.reshape(-1, *(1,) * (s.latents.ndim - 1))
        mean = torch.where(given, torch.as_tensor(self.mean), self.null_mean) * size
        std = torch.where(given, self.std, self.null_std) * size
        return average_velocity(s.latents, t, r, mean=mean.to(s.latents), variance=std.to(s.latents) ** 2)


@dataclass(frozen=True, kw_only=True)
class PastChunks:
    """Cached chunks of a LinearGaussian, (B, chunks, C) per modality, up to chunk ``last``."""

    latents: dict[str, Tensor]
    last: int

    def before(self, m: str, s: Stream) -> Tensor:
        """Return the chunk before each chunk of ``s``."""
        latents = self.latents[m]
        return latents[:, s.chunk - 1 - (self.last - latents.shape[1] + 1)]

    def append(self, x: Streams) -> "PastChunks":
        joined = {m: torch.cat([self.latents[m], s.latents], dim=1) for m, s in x.items()}
        return PastChunks(latents=joined, last=int(next(iter(x.values())).chunk[-1])) if x else self

    def detach(self) -> "PastChunks":
        return replace(self, latents={m: v.detach() for m, v in self.latents.items()})

    def shared_passes(self) -> "PastChunks":
        return self

    def rows(self, index: Tensor) -> "PastChunks":
        return replace(self, latents={m: v[index] for m, v in self.latents.items()})

    @classmethod
    def stack(cls, parts: Sequence["PastChunks"]) -> "PastChunks":
        joined = {m: torch.cat([p.latents[m] for p in parts]) for m in parts[0].latents}
        return replace(parts[0], latents=joined)

    def evict_before(self, chunk: int) -> "PastChunks":
        keep = self.last - (chunk - 1) + 1
        return replace(self, latents={m: v[:, -keep:] for m, v in self.latents.items()})


class LinearGaussian(nn.Module):
    """Model of the next chunk ~ N(alpha h + delta, v), h: chunk before it. Chunk 0 continues ``cond.voice``.

    delta is frozen: a capacity error. Both modes are exact, the few-step mode by the flow map.
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
        past = cache or PastChunks(latents={AUDIO: cond.voice}, last=-1)
        if store:
            return {}, past.append(x)
        return {m: self._velocity(s, t[m], r[m], past.before(m, s)) for m, s in x.items()}, past

    def _velocity(self, s: Stream, t: Tensor, r: Tensor, h: Tensor) -> Tensor:
        t, r = (expand_levels(level, s.chunk, s.latents) for level in (t, r))
        return average_velocity(s.latents, t, r, mean=self.alpha * h + self.delta, variance=self.v)


PERSISTENCE = 0.95  # x_k = a x_{k-1} + sqrt(1 - a^2) w_k
BIAS = 0.05  # delta
CHUNKS = 16  # values per clip; the first is a condition, like a first frame


def linear_clips(rows: int, channels: int, number: int, chunks: int = CHUNKS) -> AVBatch:
    """Return batch ``number`` of the world, with ``channels`` copies per row. The first value is the condition."""
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
    """Return (alpha, v) at which flow matching on coupled history of strength s converges (see TRUTHS.md)."""
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
    """Return (alpha, v) of DMD on an endless rollout with an exact teacher.

    E h ((alpha - a) h + delta) = 0, v = 1 - a^2.
    """
    a, delta, v = PERSISTENCE, BIAS, 1 - PERSISTENCE**2
    alpha = a
    for _ in range(200):
        mean = delta / (1 - alpha)
        alpha = a - delta * mean / (v / (1 - alpha**2) + mean**2)
    return alpha, v


@dataclass(frozen=True, kw_only=True)
class RolloutStatistics:
    """Statistics of a chunk model that runs on its own output."""

    drift: float  # mean at k = 64
    lag1: float  # correlation of neighboring chunks
    seam: float  # E (h_k - h_{k-1})^2 / (2 (1 - a)): 1 in the data
    kl: float  # of a stationary pair of neighbors, model to truth


def rollout_statistics(alpha: float, v: float, delta: float = BIAS) -> RolloutStatistics:
    """Return the closed forms for h_k = alpha h_{k-1} + delta + sqrt(v) w_k."""
    a, variance, mean = PERSISTENCE, v / (1 - alpha**2), delta / (1 - alpha)
    own = variance * torch.tensor([[1, alpha], [alpha, 1]], dtype=torch.float64)
    truth = torch.tensor([[1, a], [a, 1]], dtype=torch.float64)
    shift = torch.full((2,), mean, dtype=torch.float64)
    pair = torch.distributions.MultivariateNormal(shift, own)
    kl = torch.distributions.kl_divergence(pair, torch.distributions.MultivariateNormal(0 * shift, truth))
    return RolloutStatistics(
        drift=mean * (1 - alpha**64),
        lag1=alpha,
        seam=((alpha - 1) ** 2 * variance + v) / (2 * (1 - a)),
        kl=float(kl),
    )
