"""Exposure bias with exact answers: the table of TRUTHS.md, in closed form and learned by the project's objectives."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mfcore.flow import TimeConfig
from mfcore.metrics.history_use import history_use
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.losses import Objective, StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext, schedule
from mfcore.types import AUDIO, AVBatch
from tests.helpers.analytic_models import (
    BIAS,
    PERSISTENCE,
    LinearGaussian,
    RolloutStatistics,
    condition,
    coupled_fixed_point,
    linear_clips,
    rollout_statistics,
    self_forced_fixed_point,
    stream,
)

FITTED_V = 1 - PERSISTENCE**2 + BIAS**2  # teacher forcing: alpha = a, the bias stays in the residual

# strength, alpha, drift of the mean at k = 64, lag-1 correlation, seam energy, pair KL
TABLE = [
    (0.0, 0.950, 0.96, 0.95, 1.03, 0.51),
    (0.1, 0.945, 0.88, 0.945, 1.13, 0.42),
    (0.2, 0.928, 0.69, 0.93, 1.45, 0.29),
    (0.25, 0.916, 0.59, 0.92, 1.70, 0.265),
    (0.4, 0.856, 0.35, 0.86, 2.9, 0.48),
    (0.7, 0.526, 0.11, 0.53, 9.5, 3.1),
    (1.0, 0.065, 0.05, 0.07, 18.7, 7.5),
]


@pytest.mark.parametrize(("s", "alpha", "drift", "lag1", "seam", "kl"), TABLE)
def test_the_closed_form_equals_the_table(*, s, alpha, drift, lag1, seam, kl):
    fixed, v = coupled_fixed_point(s)
    does = rollout_statistics(fixed, v)
    assert fixed == pytest.approx(alpha, abs=0.002)
    assert does.drift == pytest.approx(drift, abs=0.006)
    assert does.lag1 == pytest.approx(lag1, abs=0.006)
    assert does.seam == pytest.approx(seam, rel=0.01)
    assert does.kl == pytest.approx(kl, rel=0.02)


def test_a_quarter_is_the_best_strength_of_the_table():
    kl = {s: rollout_statistics(*coupled_fixed_point(s)).kl for s, *_ in TABLE}
    assert min(kl, key=kl.__getitem__) == 0.25


def learn(
    objective: Objective,
    student: LinearGaussian,
    clips: Callable[[int], AVBatch],
    *,
    steps: int = 120,
    lr: float = 0.05,
    **others: LinearGaussian,
) -> LinearGaussian:
    """Train by Adam with a learning rate that decays to zero."""
    models = {"student": student, "ema": student} | others
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        terms = objective(models, clips(step), StepInfo(seed=0, step=step, stage_step=step))
        optimizer.zero_grad()
        total_loss(terms["student"]).backward()
        optimizer.step()
        if "fake" in models:  # the exact score of what the student makes: its own law
            models["fake"].load_state_dict(student.state_dict())
    return student


def eight_clips(step: int) -> AVBatch:
    return linear_clips(8, 64, step)


@torch.no_grad()
def measured(model: LinearGaussian) -> RolloutStatistics:
    """Return statistics of 65 chunks of the rollout, over 16384 copies."""
    draw = torch.Generator().manual_seed(7)
    cond = condition(256, voice=torch.randn(256, 1, 64, generator=draw))
    starts = ({AUDIO: stream(torch.randn(256, 1, 64, generator=draw), first=k)} for k in range(64))
    chunks = rollout(DenoiserContext(model=model, cond=cond), starts, schedule(2, {AUDIO: 1.0}))
    h = join_chunks(c.clean for c in chunks)[AUDIO].latents[:, -2:]
    before, last = h[:, 0].flatten(), h[:, 1].flatten()
    return RolloutStatistics(
        drift=float(last.mean()),
        lag1=float(torch.corrcoef(torch.stack([before, last]))[0, 1]),
        seam=float((last - before).square().mean() / (2 * (1 - PERSISTENCE))),
        kl=rollout_statistics(model.alpha.item(), model.v.item()).kl,
    )


def assert_statistics(model: LinearGaussian, *, alpha: float, drift: float, lag1: float, seam: float) -> None:
    """Assert the values within the tolerances of TRUTHS.md."""
    does = measured(model)
    assert model.alpha.item() == pytest.approx(alpha, abs=0.02)
    assert does.drift == pytest.approx(drift, abs=0.04)
    assert does.lag1 == pytest.approx(lag1, abs=0.02)
    assert does.seam == pytest.approx(seam, rel=0.05)


def one_kind(kind: str, **changes) -> MutualForcingObjective:
    """Return the mutual objective with rows of one kind, without ShortCut because the few-step mode is exact."""
    settings = {
        "time": TimeConfig(shift={AUDIO: 1.0}),
        "rows": (kind,),
        "finest_rows": (True,),
        "guidance": 1.0,
        "shortcut_weight": 0.0,
    }
    return MutualForcingObjective(MutualConfig(**(settings | changes)))


def test_teacher_forcing_learns_the_first_row():
    objective = FlowMatchingObjective(FlowMatchingConfig(time=TimeConfig(shift={AUDIO: 1.0})))
    model = learn(objective, LinearGaussian(0.5, BIAS, 0.5), eight_clips, steps=200)
    assert_statistics(model, alpha=0.950, drift=0.96, lag1=0.95, seam=1.03)
    assert model.v.item() == pytest.approx(FITTED_V, rel=0.05)


def test_coupled_history_of_a_quarter_learns_its_row():
    model = learn(one_kind("coupled", strengths=(2,)), LinearGaussian(0.5, BIAS, 0.5), eight_clips)
    assert_statistics(model, alpha=0.916, drift=0.59, lag1=0.92, seam=1.70)
    assert model.v.item() == pytest.approx(coupled_fixed_point(0.25)[1], rel=0.05)


def test_the_literal_reading_unlearns_history():
    model = learn(one_kind("literal", rollout_steps=(1, 2)), LinearGaussian(0.9, BIAS, 0.2), eight_clips)
    assert_statistics(model, alpha=0.065, drift=0.05, lag1=0.07, seam=18.7)


DMD = {"alpha": 0.919, "drift": 0.62, "lag1": 0.92, "seam": 1.02}


def test_the_closed_form_of_dmd():
    alpha, v = self_forced_fixed_point()
    does = rollout_statistics(alpha, v)
    assert {"alpha": alpha, "drift": does.drift, "lag1": does.lag1, "seam": does.seam} == pytest.approx(DMD, abs=0.006)
    assert does.kl == pytest.approx(0.25, abs=0.005)


def test_dmd_on_free_history_with_an_exact_teacher_trades_memory_for_less_drift():
    teacher = LinearGaussian(PERSISTENCE, 0.0, 1 - PERSISTENCE**2)
    student, fake = (LinearGaussian(0.95, BIAS, 0.2) for _ in range(2))

    def middle_of_a_stream(step: int) -> AVBatch:
        """Return clips that start in the stationary state of the student's rollout, as after forty chunks."""
        batch = linear_clips(16, 64, step, chunks=4)
        alpha, v = student.alpha.item(), student.v.item()
        h = batch.cond.voice * (v / (1 - alpha**2)) ** 0.5 + BIAS / (1 - alpha)
        return replace(batch, cond=replace(batch.cond, voice=h))

    objective = one_kind("free", rollout_steps=(2, 4), dmd_weight=1.0)
    model = learn(objective, student, middle_of_a_stream, steps=200, lr=0.02, ema=teacher, fake=fake)
    assert_statistics(model, **DMD)


def test_history_use_separates_teacher_forcing_from_the_literal_reading():
    batch, time = linear_clips(64, 64, 0), TimeConfig(shift={AUDIO: 1.0}, uniform_share=1.0)
    alpha, v = coupled_fixed_point(1.0)
    teacher_forcing, literal = (
        history_use(model, batch, time, seed=0)[AUDIO]
        for model in (LinearGaussian(PERSISTENCE, BIAS, FITTED_V), LinearGaussian(alpha, BIAS, v))
    )
    assert teacher_forcing == pytest.approx(10.3, rel=0.1)
    assert literal == pytest.approx(1.1, abs=0.1)
