"""ShortCut: a long step of the few-step mode equals two half steps (METHOD 6).

Intervals are dyadic in the schedule index a in [0, 1], mapped through the time shift: at depth l they have length
2^-l. At the finest level the target comes from the guided multi-step mode by the midpoint rule. At coarser levels it
comes from two calls of the unguided few-step mode, so guidance enters once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mfcore.device import row_indices
from mfcore.flow import expand_levels, move_streams, shift_time
from mfcore.objectives.losses import LossTerm, chunk_means
from mfcore.rng import uniform_rows
from mfcore.solver import DenoiserContext, Mode
from mfcore.types import NoiseLevels, Streams

BaseRule = Literal["midpoint", "two_midpoints", "euler"]
"""Rule for the average velocity of the multi-step mode over an interval of the finest level."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Top, middle and bottom level of an interval per chunk and modality."""

    t: NoiseLevels
    m: NoiseLevels
    r: NoiseLevels

    def rows(self, index: Tensor) -> "Intervals":
        """Return the intervals of some rows."""
        here = row_indices(index, next(iter(self.t.values())))

        def take(levels: NoiseLevels) -> NoiseLevels:
            return {m: level[here] for m, level in levels.items()}

        return Intervals(t=take(self.t), m=take(self.m), r=take(self.r))


def dyadic_intervals(depth: Int64[Tensor, " B"], draws: Float[Tensor, "B K"], shift: Mapping[str, float]) -> Intervals:
    """Return the interval of length 2^-depth that contains the uniform draw, per sample and chunk."""
    count = 2.0 ** depth.double()[:, None]
    bottom = (draws.double() * count).floor()

    def levels(index: Tensor) -> dict[str, Tensor]:
        return {m: shift_time(index, s).float() for m, s in shift.items()}

    return Intervals(t=levels((bottom + 1) / count), m=levels((bottom + 0.5) / count), r=levels(bottom / count))


def draw_depth(
    finest: int, is_finest: Tensor, *, seed: int, name: str, samples: Tensor, power: float = 1.0
) -> Int64[Tensor, " B"]:
    """Return depth ``finest`` for rows with ``is_finest``, else a draw from 0 .. finest - 1 by sample number.

    Depth l has the share ((l + 1) / finest)^(1 / power) - (l / finest)^(1 / power): uniform at power 1, and increasing
    in l below it (at 1/2 in the ratio 1 : 3 : 5 ...).
    """
    coarse = (uniform_rows(seed, name, samples, 1)[:, 0] ** power * finest).long().clamp_max(max(finest - 1, 0))
    return torch.where(is_finest, torch.full_like(coarse, finest), coarse)


def midpoint_target(multi: DenoiserContext, x: Streams, at: Intervals) -> dict[str, Tensor]:
    """Return v(x_c, c), x_c = x_t - (t - c) v(x_t, t), c = (t + r) / 2: average velocity over [r, t], second order.

    ``at.m`` is the middle of the schedule's index. Under a time shift it has a 5 to 60 times larger error than c.
    """
    return _midpoint_rule(multi, x, at.t, at.r)


def two_midpoints_target(multi: DenoiserContext, x: Streams, at: Intervals) -> dict[str, Tensor]:
    """Return the average of the midpoint rule over both halves of [r, t]: a quarter of the error, twice the calls."""
    middle = _middle(at.t, at.r)
    upper = _midpoint_rule(multi, x, at.t, middle)
    lower = _midpoint_rule(multi, move_streams(x, upper, at.t, middle), middle, at.r)
    return {m: (upper[m] + lower[m]) / 2 for m in upper}


def _midpoint_rule(multi: DenoiserContext, x: Streams, t: NoiseLevels, r: NoiseLevels) -> dict[str, Tensor]:
    middle = _middle(t, r)
    return multi.velocity(move_streams(x, multi.velocity(x, t, t), t, middle), middle, middle)


def _middle(t: NoiseLevels, r: NoiseLevels) -> NoiseLevels:
    return {m: (t[m] + r[m]) / 2 for m in t}


def _weighted_mean(
    upper: Mapping[str, Tensor], lower: Mapping[str, Tensor], x: Streams, at: Intervals
) -> dict[str, Tensor]:
    """Return [(t - m) upper + (m - r) lower] / (t - r); under a time shift the halves differ in length."""
    out: dict[str, Tensor] = {}
    for m, s in x.items():
        t, mid, r = (expand_levels(level[m], s.chunk, s.latents) for level in (at.t, at.m, at.r))
        out[m] = ((t - mid) * upper[m] + (mid - r) * lower[m]) / (t - r)
    return out


def euler_target(multi: DenoiserContext, x: Streams, at: Intervals) -> dict[str, Tensor]:
    """Return two Euler halves of the multi-step mode (first order): an ablation at equal cost."""
    return halves_target(multi, x, at, mode="multi")


def halves_target(context: DenoiserContext, x: Streams, at: Intervals, *, mode: Mode = "few") -> dict[str, Tensor]:
    """Return [(t - m) u(x_t, t, m) + (m - r) u(x_m, m, r)] / (t - r)."""
    upper = context.velocity(x, at.t, at.m if mode == "few" else at.t)
    lower = context.velocity(move_streams(x, upper, at.t, at.m), at.m, at.r if mode == "few" else at.m)
    return _weighted_mean(upper, lower, x, at)


@torch.no_grad()
def shortcut_target(
    teacher: DenoiserContext, x: Streams, at: Intervals, is_finest: Tensor, *, base: BaseRule = "midpoint"
) -> dict[str, Tensor]:
    """Return the targets: the guided ``base`` rule for rows with ``is_finest``, else two unguided halves."""
    out = {m: torch.empty_like(s.latents, dtype=torch.float32) for m, s in x.items()}
    base_target = {"midpoint": midpoint_target, "two_midpoints": two_midpoints_target, "euler": euler_target}[base]
    for rows, rule, context in ((is_finest, base_target, teacher), (~is_finest, halves_target, teacher.unguided())):
        index = rows.nonzero()[:, 0]
        if len(index):
            part = rule(context.rows(index).shared_passes(), {m: s.rows(index) for m, s in x.items()}, at.rows(index))
            for m, value in part.items():
                out[m][index] = value.float()
    return out


def shortcut_loss(
    u: Mapping[str, Tensor], target: Mapping[str, Tensor], clean: Streams, at: Intervals, *, weight: float = 1.0
) -> list[LossTerm]:
    """Return mean (u(x_t, t, r) - target)^2 per sample, chunk and modality."""
    return [
        LossTerm(
            name="shortcut",
            modality=m,
            values=chunk_means((u[m].float() - target[m]) ** 2, s.chunk),
            weight=weight,
            level=at.t[m],
        )
        for m, s in clean.items()
    ]
