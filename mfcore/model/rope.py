"""Rotary positions over (time, height, width); time in seconds, angles in float64.

Half of the channel pairs of a head rotate with time, a quarter each with height and width (METHOD 4). In the layout of
Wan it is a third each, and time takes the remainder. Text keys rotate with time only, with separate constants, so that
a word aligns with the audio at its time.
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
    """Rotation of each channel pair (i, i + dim/2) of each token, stored for both channels."""

    cos: Float[Tensor, "*N dim"]
    sin: Float[Tensor, "*N dim"]  # negative in the first half


def rotation(angle: Float[Tensor, "*N half"], like: Tensor) -> Rotation:
    """Return the rotation by float64 angles, in at least float32, on the device of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    cos, sin = angle.cos(), angle.sin()
    both = (torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
    return Rotation(*(to_device_of(part, like, dtype) for part in both))


def rotate(x: Float[Tensor, "*batch N dim"], by: Rotation) -> Tensor:
    """Rotate channel pairs (i, i + dim/2) of ``x``: a cos - b sin, b cos + a sin."""
    return torch.addcmul(x * by.cos, x.roll(x.shape[-1] // 2, dims=-1), by.sin).to(x.dtype)


def _frequencies(pairs: int, base: float, like: Tensor) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64, device=like.device) / pairs)


def rotation_angles(times: Tensor, ys: Tensor, xs: Tensor, config: ModelConfig) -> Float[Tensor, "*N half"]:
    """Return the angle of every channel pair in float64: half of the head width per token.

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
    """Return angles in which every channel pair rotates with time (text positions)."""
    return times[..., None].double() * config.rope_seconds_scale * _frequencies(config.head_dim // 2, BASE, times)
