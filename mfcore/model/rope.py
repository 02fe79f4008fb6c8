"""Rotary positions over (time, height, width); time in seconds, angles in float64.

Half of a head's channel pairs turn with time, a quarter each with height and width (METHOD 4); in Wan's layout a third
each, time taking what is left over. Text keys turn with time alone, with constants of their own, so that a word and the
sound at its time meet.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.model.config import ModelConfig

BASE = 100.0
WAN_BASE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """By how much each channel pair (i, i + dim/2) of each token is turned: for both of its channels."""

    cos: Float[Tensor, "*N dim"]
    sin: Float[Tensor, "*N dim"]  # the first half negative


def rotation(angle: Float[Tensor, "*N half"], like: Tensor) -> Rotation:
    """From angles in float64. Never narrower than float32; on the device of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    cos, sin = angle.cos(), angle.sin()
    both = (torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
    return Rotation(*(to_device_of(part, like, dtype) for part in both))


def rotate(x: Float[Tensor, "*batch N dim"], by: Rotation) -> Tensor:
    """Turn channel pairs (i, i + dim/2) of ``x``: a cos - b sin, b cos + a sin."""
    return torch.addcmul(x * by.cos, x.roll(x.shape[-1] // 2, dims=-1), by.sin).to(x.dtype)


def _frequencies(pairs: int, base: float, like: Tensor) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64, device=like.device) / pairs)


def rotation_angles(times: Tensor, ys: Tensor, xs: Tensor, config: ModelConfig) -> Float[Tensor, "*N half"]:
    """Angles of every channel pair, float64: half a head's width per token.

    ``times`` in seconds, ``ys`` and ``xs`` in tokens, all of one shape.
    """
    pairs = config.head_dim // 2
    space = pairs // 3 if config.layout == "wan" else pairs // 4
    base = WAN_BASE if config.layout == "wan" else BASE
    return torch.cat(
        [
            times[..., None].double() * config.rope_seconds_scale * _frequencies(pairs - 2 * space, base, times),
            ys[..., None].double() * _frequencies(space, base, ys),
            xs[..., None].double() * _frequencies(space, base, xs),
        ],
        dim=-1,
    )


def time_angles(times: Tensor, config: ModelConfig) -> Float[Tensor, "*N half"]:
    """Angles that turn every channel pair with time alone (text positions)."""
    return times[..., None].double() * config.rope_seconds_scale * _frequencies(config.head_dim // 2, BASE, times)
