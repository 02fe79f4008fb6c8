"""Few-step training on a ring of eight modes: four Euler steps blur between them, four few steps must not.

The clips' chunks are independent points in the plane, so that history does not help and only few-step training counts.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mfcore.flow import TimeConfig
from mfcore.objectives import baselines
from mfcore.objectives.losses import Objective, StepInfo, total_loss
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.rng import generator
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext, Mode, schedule
from mfcore.types import AUDIO, AVBatch, Condition, NoiseLevels, Streams
from tests.helpers.analytic_models import EmptyCache, condition, stream

MODES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
SPREAD = 0.1
ROWS, CHUNKS = 48, 12
CONFIG = MutualConfig(
    time=TimeConfig(shift={AUDIO: 1.0}),
    rows=("real", "real"),
    finest_rows=(True, False),
    finest=4,
    strengths=(2,),
    rollout_steps=(4,),
    guidance=1.0,
)


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Return v of the ring, from the posterior mean of x_0."""
    d = spread(t)
    gap = x[..., None, :] - (1 - t)[..., None] * MODES
    weight = torch.softmax(-gap.square().sum(-1) / (2 * d), dim=-1)
    x0 = MODES + ((1 - t) * SPREAD**2 / d)[..., None] * gap
    return (x - (weight[..., None] * x0).sum(-2)) / t


def spread(t: Tensor) -> Tensor:
    return ((1 - t) * SPREAD) ** 2 + t**2


class Exact:
    """Exact multi-step mode."""

    def __call__(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ):
        if not x:
            return {}, EmptyCache()
        return {AUDIO: exact_velocity(x[AUDIO].latents, t[AUDIO][..., None].clamp_min(1e-3))}, EmptyCache()


class Plane(nn.Module):
    """Small network of (x, t, t - r): the exact velocity, and a correction for r < t."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.few = nn.Sequential(
            nn.Linear(4 + 2 + 8, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )
        nn.init.zeros_(self.few[-1].weight)
        nn.init.zeros_(self.few[-1].bias)

    def forward(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ):
        if not x:
            return {}, EmptyCache()
        at, level = x[AUDIO].latents, t[AUDIO][..., None]
        gap = (t[AUDIO] - r[AUDIO])[..., None]
        waves = torch.cat(
            [(k * math.pi * gap).sin() for k in (0.5, 1, 2, 4)] + [(k * math.pi * level).sin() for k in (0.5, 1, 2, 4)],
            -1,
        )
        fixed = self.score(at, level)
        return {AUDIO: fixed + (gap > 0) * self.few(torch.cat([at, fixed, level, gap, waves], dim=-1))}, EmptyCache()

    def score(self, at: Tensor, level: Tensor) -> Tensor:
        return exact_velocity(at, level.clamp_min(1e-3))


class Fake(Plane):
    """Trained fake score, initialized with the exact score."""

    def forward(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ):
        if not x:
            return {}, EmptyCache()
        at, level = x[AUDIO].latents, t[AUDIO][..., None]
        waves = torch.cat([(k * math.pi * level).sin() for k in (0.5, 1, 2, 4)] * 2, -1)
        fixed = self.score(at, level)
        return {AUDIO: fixed + self.few(torch.cat([at, fixed, level, 0 * level, waves], dim=-1))}, EmptyCache()


def clips(step: int) -> AVBatch:
    draw = generator(5, "ring", step)
    pick = torch.randint(8, (ROWS, CHUNKS), generator=draw)
    points = MODES[pick] + SPREAD * torch.randn(ROWS, CHUNKS, 2, generator=draw)
    samples = torch.arange(ROWS) + step * ROWS
    return AVBatch(streams={AUDIO: stream(points)}, cond=condition(ROWS), samples=samples)


def train(objective: Objective, steps: int, lr: float = 2e-3) -> Plane:
    student, fake = Plane(), Fake()
    average = copy.deepcopy(student).requires_grad_(False)
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr),
        "fake": torch.optim.Adam(fake.parameters(), 4 * lr),
    }
    nets = {"student": student, "fake": fake}
    for step in range(steps):
        terms = objective({**nets, "ema": average}, clips(step), StepInfo(seed=0, step=step, stage_step=step))
        for name, own in terms.items():
            if not own:
                continue
            total_loss(own).backward()
            optimizers[name].param_groups[0]["lr"] = (lr if name == "student" else 4 * lr) * (1 - step / steps)
            optimizers[name].step()
            optimizers[name].zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 0.02)
    return average


@torch.no_grad()
def off_mode(model, steps: int, mode: Mode = "few") -> float:
    """Return the share of points further than three spreads from every mode."""
    draw = torch.Generator().manual_seed(1)
    starts = ({AUDIO: stream(torch.randn(2000, 1, 2, generator=draw), first=k)} for k in range(4))
    chunks = rollout(
        DenoiserContext(model=model, cond=condition(2000)), starts, schedule(steps, {AUDIO: 1.0}), mode=mode
    )
    points = join_chunks(c.clean for c in chunks)[AUDIO].latents.flatten(0, 1)
    return float((torch.cdist(points, MODES).min(1).values > 3 * SPREAD).float().mean())


EULER = {2: 0.93, 4: 0.28, 8: 0.074, 50: 0.013}
"""Off-mode shares of the exact velocity."""


@pytest.mark.parametrize(("steps", "share"), EULER.items())
def test_euler_steps_blur_between_modes(steps, share):
    assert off_mode(Exact(), steps, "multi") == pytest.approx(share, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shortcut_learns_what_four_euler_steps_cannot():
    few = train(baselines.shortcut_forced(CONFIG), 600)
    assert off_mode(few, 4) < 0.8 * EULER[4]
    assert off_mode(few, 2) < 0.6 * EULER[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dmd_sharpens_and_finishing_the_schedule_beats_the_jump():
    config = replace(CONFIG, fake_from=0, dmd_from=50)
    finish, jump = (train(baselines.dmd_self_forcing(replace(config, jump_exit=j)), 600) for j in (False, True))
    for steps in (4, 8):
        assert off_mode(finish, steps) < 0.9 * EULER[steps]
        assert off_mode(finish, steps) < off_mode(jump, steps)
