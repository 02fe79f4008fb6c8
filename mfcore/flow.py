"""Time convention, and the path between data and noise.

``t = 0`` is data, ``t = 1`` is noise: ``x_t = (1 - t) x_0 + t eps``, velocity ``v = eps - x_0`` (METHOD 2). A network
returns the average velocity ``u`` from t down to r, ``0 <= r <= t``. One step is ``x_r = x_t - (t - r) u``. The
multi-step mode uses r = t, the few-step mode r < t.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.errors import check_range
from mfcore.types import AUDIO, NoiseLevels, Stream, Streams


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x_0 + t eps."""
    return (1 - t) * x0 + t * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """Return v = eps - x_0."""
    return eps - x0


def step_along(xt: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return x_r = x_t - (t - r) u, one step along the average velocity."""
    return xt - (t - r) * u


def shift_time(t: Tensor, s: float) -> Tensor:
    """Return s t / (1 + (s - 1) t). Shifts compose: shift_a(shift_b(t)) = shift_ab(t)."""
    return s * t / (1 + (s - 1) * t)


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Distribution of the noise levels of a run."""

    shift: dict[str, float]  # time shift per modality; 1: none
    logit_mean: float = 0.0  # mean of the logit-normal of training times
    logit_std: float = 1.0  # its standard deviation
    uniform_share: float = 0.1  # share of training times uniform on (0, 1] before the shift
    independent: bool = False  # draw a separate level per modality instead of one shared by both

    def __post_init__(self) -> None:
        for modality, shift in self.shift.items():
            check_range(f"shift.{modality}", shift, 0, 1000, above=True)
        check_range("logit_mean", self.logit_mean, -20, 20)
        check_range("logit_std", self.logit_std, 0, 20, above=True)
        check_range("uniform_share", self.uniform_share, 0, 1)


def training_times(config: TimeConfig, draws: Float[Tensor, "*batch 3"], modality: str) -> Float[Tensor, "*batch"]:
    """Return logit-normal times with a uniform share on (0, 1], all shifted (METHOD 2).

    ``draws`` are uniform in [0, 1): choice of the law, its quantile, and a second quantile for ``independent`` levels.
    """
    separate = config.independent and modality == AUDIO
    quantile = draws[..., 2 if separate else 1].double()
    normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
    t = torch.where(
        draws[..., 0] < config.uniform_share,
        1 - quantile,  # (0, 1]: every sampler starts at 1, where the logit-normal has almost no mass
        torch.sigmoid(config.logit_mean + config.logit_std * normal),
    )
    return shift_time(t, config.shift[modality]).float()


def expand_levels(level: Float[Tensor, "B K"], chunk: Tensor, like: Tensor) -> Tensor:
    """Expand levels per chunk to levels per latent, in a shape that broadcasts with ``like`` (B, n, C, ...).

    Chunk numbers count from the first one in ``chunk``. Levels are at least float32: in bfloat16 a small t - r is lost.
    """
    per_latent = level.index_select(1, to_device_of(chunk - chunk[0], level))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return per_latent.reshape(per_latent.shape + (1,) * (like.ndim - 2)).to(dtype)


def noise_streams(streams: Streams, eps: Mapping[str, Tensor], t: NoiseLevels) -> dict[str, Tensor]:
    """Return x_t of every modality."""
    return {m: interpolate(s.latents, eps[m], expand_levels(t[m], s.chunk, s.latents)) for m, s in streams.items()}


def add_noise(streams: Streams, eps: Mapping[str, Tensor], t: NoiseLevels) -> dict[str, Stream]:
    """Return the streams at level t, as input of a network."""
    return {m: streams[m].with_latents(x) for m, x in noise_streams(streams, eps, t).items()}


def move_streams(x: Streams, u: dict[str, Tensor], t: NoiseLevels, r: NoiseLevels) -> Streams:
    """Take one step in every modality."""
    moved: dict[str, Stream] = {}
    for m, s in x.items():
        start = expand_levels(t[m], s.chunk, s.latents)
        end = expand_levels(r[m], s.chunk, s.latents)
        moved[m] = s.with_latents(step_along(s.latents, u[m], start, end))
    return moved
