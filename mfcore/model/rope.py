"""Rotary positions over (time, height, width); time in seconds, angles in float64.

Half of a head's channel pairs turn with time, a quarter each with height and width (METHOD 4). Text keys turn with time
alone, with the same constants, so that a word and the sound at its time meet.
"""

import torch
from jaxtyping import Float
from torch import Tensor

TIME_BASE = 100.0
SPACE_BASE = 100.0


def _frequencies(pairs: int, base: float) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def angles(times: Tensor, ys: Tensor, xs: Tensor, head_dim: int, seconds_scale: float) -> Float[Tensor, "*N half"]:
    """Angles of every channel pair, float64: ``head_dim / 2`` per token.

    ``times`` in seconds, ``ys`` and ``xs`` in tokens, all of one shape.
    """
    time_pairs, space_pairs = head_dim // 4, head_dim // 8
    space = _frequencies(space_pairs, SPACE_BASE)
    return torch.cat(
        [
            times[..., None].double() * seconds_scale * _frequencies(time_pairs, TIME_BASE),
            ys[..., None].double() * space,
            xs[..., None].double() * space,
        ],
        dim=-1,
    )


def time_angles(times: Tensor, head_dim: int, seconds_scale: float) -> Float[Tensor, "*N half"]:
    """Angles that turn every channel pair with time alone (text positions)."""
    return times[..., None].double() * seconds_scale * _frequencies(head_dim // 2, TIME_BASE)


def rotate(x: Float[Tensor, "*batch N dim"], angle: Float[Tensor, "*N half"]) -> Tensor:
    """Turn channel pairs (i, i + dim/2) of ``x`` by ``angle``; the angle is reduced in float64 and then cast."""
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
