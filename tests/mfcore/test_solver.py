"""Solver steps, schedules and guidance on Gaussians (TRUTHS, exact properties 2 and 3)."""

import itertools

import pytest
import torch

from mfcore.objectives.shortcut import Intervals, midpoint_target
from mfcore.solver import (
    DenoiserContext,
    Mode,
    Renoising,
    constant_levels,
    denoise,
    num_function_evaluations,
    sampler_schedule,
    schedule,
    single_step_schedule,
    solver_step,
)
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.analytic_models import GaussianModel, condition, stream

PLAIN = {AUDIO: 1.0}


def line_of(mean_and_slope: Stream) -> tuple[float, float]:
    """Return (mean, std) of an affine sampler: image of 0, and distance of the images of 0 and 1."""
    at_zero, at_one = mean_and_slope.latents.flatten().tolist()
    return at_zero, at_one - at_zero


def zero_and_one() -> dict[str, Stream]:
    return {AUDIO: stream(torch.tensor([0.0, 1.0]).reshape(2, 1, 1))}


def sample(context: DenoiserContext, steps: int, mode: Mode, shift: float = 1.0) -> tuple[float, float]:
    x, plan = zero_and_one(), schedule(steps, {AUDIO: shift})[AUDIO]
    for t, r in itertools.pairwise(plan):
        x = dict(solver_step(context, x, constant_levels(x, {AUDIO: t}), constant_levels(x, {AUDIO: r}), mode=mode))
    return line_of(x[AUDIO])


def test_a_schedule_runs_from_noise_to_data_through_the_shift():
    plan = schedule(4, {VIDEO: 5.0, AUDIO: 1.0})
    assert plan[AUDIO].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert plan[VIDEO].tolist() == pytest.approx([1.0, 15 / 16, 5 / 6, 5 / 8, 0.0])
    assert single_step_schedule(0.25, {VIDEO: 5.0, AUDIO: 1.0})[VIDEO].tolist() == pytest.approx([5 / 8, 0.0])
    with pytest.raises(ValueError, match="at least one step, got 0"):
        schedule(0, PLAIN)


@pytest.mark.parametrize(("steps", "factor"), [(4, 0.6811), (8, 0.8296), (50, 0.9708)])
def test_euler_steps_shrink_a_gaussian_by_the_known_factor(steps, factor):
    mean, std = sample(DenoiserContext(model=GaussianModel(mean=1.5, std=0.5), cond=condition(2)), steps, "multi")
    assert std / 0.5 == pytest.approx(factor, abs=1e-4)
    assert mean == pytest.approx(1.5, abs=1e-5)  # the mean moves on a straight line


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_a_flow_map_is_exact_in_any_number_of_steps(steps, shift):
    context = DenoiserContext(model=GaussianModel(mean=1.5, std=0.5), cond=condition(2))
    assert sample(context, steps, "few", shift) == pytest.approx((1.5, 0.5), abs=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize(("steps", "first_step"), [(1, 0), (2, 0), (4, 0), (4, 2), (6, 3)])
def test_renoising_keeps_the_law_of_a_gaussian_with_an_exact_flow_map(steps, first_step, shift):
    """Every step ends at a sample of the data, and noise raises it to a sample of the next level."""
    plan = sampler_schedule("mixed" if first_step else "renoise", steps, {AUDIO: shift})
    model = GaussianModel(mean=1.5, std=0.5)
    rows = 1 + steps  # the image of 0, then of a unit in the start and in the noise of each later step
    start = torch.zeros(rows, 1, 1)
    start[1] = 1.0

    def unit_noise(state: dict[str, Stream], step: int) -> dict[str, torch.Tensor]:
        noise = torch.zeros_like(state[AUDIO].latents)
        noise[1 + step] = 1.0
        return {AUDIO: noise}

    context = DenoiserContext(model=model, cond=condition(rows))
    renoising = Renoising(noise=unit_noise, first_step=first_step)
    clean, _ = denoise(context, {AUDIO: stream(start)}, plan, renoising=renoising)
    images = clean[AUDIO].latents.flatten()
    assert float(images[0]) == pytest.approx(1.5, abs=1e-5)
    slopes = images[1:] - images[0]
    assert float(slopes.square().sum().sqrt()) == pytest.approx(0.5, abs=1e-5)
    used = (slopes.abs() > 1e-6).tolist()
    # A jump from t = 0 keeps nothing of an earlier noise only if the level is 1; noise enters after first_step.
    assert used == [j == 0 or j > first_step for j in range(steps)]


def test_the_renoise_schedule_jumps_over_dyadic_intervals():
    assert sampler_schedule("renoise", 4, PLAIN)[AUDIO].tolist() == [1.0, 0.5, 0.25, 0.25, 0.0]
    assert sampler_schedule("renoise", 4, {AUDIO: 5.0})[AUDIO].tolist() == pytest.approx(
        [1.0, 5 / 6, 5 / 8, 5 / 8, 0.0]
    )
    assert sampler_schedule("renoise", 5, PLAIN)[AUDIO].tolist() == schedule(5, PLAIN)[AUDIO].tolist()
    with pytest.raises(ValueError, match="at least one step"):
        sampler_schedule("renoise", 0, PLAIN)


def guided_sample(model: GaussianModel, weight: float, intervals: int = 64) -> tuple[float, float]:
    """Solve the guided flow with the midpoint rule."""
    x = zero_and_one()
    context = DenoiserContext(model=model, cond=condition(2), guidance=weight)
    plan = schedule(2 * intervals, PLAIN)[AUDIO]
    for j in range(0, 2 * intervals, 2):
        at = Intervals(
            t=constant_levels(x, {AUDIO: plan[j]}),
            m=constant_levels(x, {AUDIO: plan[j + 1]}),
            r=constant_levels(x, {AUDIO: plan[j + 2]}),
        )
        u = midpoint_target(context, x, at)[AUDIO]
        x = {AUDIO: x[AUDIO].with_latents(x[AUDIO].latents - (plan[j] - plan[j + 2]) * u)}
    return line_of(x[AUDIO])


def test_guidance_takes_the_geometric_mean_of_spreads_and_not_the_tilted_law():
    weight, own, null = 2.0, 0.5, 1.0
    _, std = guided_sample(GaussianModel(std=own, null_std=null), weight)
    assert std == pytest.approx(own**weight * null ** (1 - weight), abs=1e-3)  # 0.25
    tilted = (weight / own**2 + (1 - weight) / null**2) ** -0.5
    assert tilted == pytest.approx(0.378, abs=1e-3)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 5.0])
def test_guidance_moves_the_mean_along_the_line_of_means(weight):
    mean, std = guided_sample(GaussianModel(mean=1.0, std=0.5, null_mean=0.4, null_std=0.5), weight)
    assert mean == pytest.approx(0.4 + weight * (1.0 - 0.4), abs=1e-3)
    assert std == pytest.approx(0.5, abs=1e-3)


def test_guidance_doubles_the_evaluations_unless_its_weight_is_one():
    assert num_function_evaluations(4, 1.0) == 4
    assert num_function_evaluations(4, 2.0) == 8
    assert num_function_evaluations(50, 2.0) == 100
    context = DenoiserContext(model=GaussianModel(), cond=condition(2), guidance=3.0).prefill()
    assert context.null_cache is not None
    assert context.unguided().guidance == 1.0
    assert context.unguided().null_cache is None


def test_levels_take_a_number_or_one_per_row():
    x = {AUDIO: stream(torch.zeros(2, 3, 1), first=4)}
    assert constant_levels(x, {AUDIO: 0.5})[AUDIO].tolist() == [[0.5] * 3] * 2
    assert constant_levels(x, {AUDIO: torch.tensor([0.25, 0.5])})[AUDIO].tolist() == [[0.25] * 3, [0.5] * 3]
