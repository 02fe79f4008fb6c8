"""ShortCut targets (TRUTHS, exact property 4)."""

import math

import pytest
import torch

from mfcore.flow import add_noise, move_streams
from mfcore.objectives.shortcut import (
    Intervals,
    draw_depth,
    dyadic_intervals,
    euler_target,
    halves_target,
    midpoint_target,
    shortcut_loss,
    shortcut_target,
    two_midpoints_target,
)
from mfcore.solver import DenoiserContext, constant_levels, schedule
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.analytic_models import GaussianModel, condition, stream

SPREAD = 0.5


def exact(**changes) -> DenoiserContext:
    return DenoiserContext(model=GaussianModel(mean=0.3, std=SPREAD, **changes), cond=condition(64))


def states(seed: int = 0) -> dict[str, Stream]:
    # float64, to measure the rule instead of rounding
    return {AUDIO: stream(torch.randn(64, 2, 3, generator=torch.Generator().manual_seed(seed)).double())}


def every_interval(depth: int, shift: float):
    for i in range(2**depth):
        draws = torch.full((64, 2), (i + 0.5) / 2**depth)
        yield dyadic_intervals(torch.full((64,), depth), draws, {AUDIO: shift})


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_weighted_target_is_exact_under_a_shift(depth):
    x = states()
    for at in every_interval(depth, 5.0):
        target = halves_target(exact(), x, at)[AUDIO]
        torch.testing.assert_close(target, exact().velocity(x, at.t, at.r)[AUDIO], atol=1e-5, rtol=0)


def test_a_plain_mean_of_the_halves_would_be_wrong():
    x, at = states(), next(every_interval(0, 5.0))
    upper = exact().velocity(x, at.t, at.m)[AUDIO]
    middle = {AUDIO: x[AUDIO].with_latents(x[AUDIO].latents - (1 - 5 / 6) * upper)}
    plain = (upper + exact().velocity(middle, at.m, at.r)[AUDIO]) / 2
    assert float((plain - exact().velocity(x, at.t, at.r)[AUDIO]).abs().max()) > 5e-3


LENGTHS = [2.0**-k for k in (4, 5, 6, 7)]


def errors(rule, context: DenoiserContext) -> list[float]:
    """Return the errors for intervals of ``LENGTHS`` that end at t = 0.5."""
    found, x = [], states()
    for length in LENGTHS:
        at = Intervals(
            **{k: {AUDIO: torch.full((64, 2), 0.5 + length * i)} for k, i in zip("tmr", (1, 0.5, 0), strict=True)}
        )
        miss = rule(context, x, at)[AUDIO] - exact().velocity(x, at.t, at.r)[AUDIO]
        found.append(float(miss.square().mean().sqrt()))
    return found


def order(rule, context: DenoiserContext) -> float:
    """Return the slope of log error against log length."""
    found = errors(rule, context)
    return math.log(found[0] / found[-1]) / math.log(LENGTHS[0] / LENGTHS[-1])


def test_the_midpoint_rule_is_of_second_order_and_euler_halves_of_first():
    instant = exact(flow_map=False)  # the multi-step mode alone: each half is then an Euler step
    assert order(midpoint_target, instant) >= 1.9
    assert order(halves_target, instant) == pytest.approx(1, abs=0.15)
    assert order(euler_target, exact()) == pytest.approx(1, abs=0.15)


def test_two_midpoints_have_at_most_a_quarter_of_the_error_of_one():
    """An eighth in this world: the second-order term of a linear flow with straight paths vanishes."""
    one, two = (errors(rule, exact(flow_map=False)) for rule in (midpoint_target, two_midpoints_target))
    assert all(b < 0.26 * a for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("rule", "share"), [(halves_target, 0.76), (midpoint_target, 0.97), (two_midpoints_target, 0.99)]
)
def test_sixteen_intervals_keep_the_known_share_of_a_small_spread(rule, share):
    sigma, steps = 0.05, 16
    context = DenoiserContext(model=GaussianModel(std=sigma, flow_map=False), cond=condition(2))
    x, plan = {AUDIO: stream(torch.tensor([0.0, 1.0]).reshape(2, 1, 1))}, schedule(2 * steps, {AUDIO: 1.0})[AUDIO]
    for j in range(0, 2 * steps, 2):
        at = Intervals(**{k: constant_levels(x, {AUDIO: plan[j + i]}) for i, k in enumerate("tmr")})
        x = {AUDIO: x[AUDIO].with_latents(x[AUDIO].latents - (plan[j] - plan[j + 2]) * rule(context, x, at)[AUDIO])}
    low, high = x[AUDIO].latents.flatten().tolist()
    assert (high - low) / sigma == pytest.approx(share, abs=0.01)


def composed_std(rule, sigma: float, shift: float, depth: int) -> float:
    """Return the standard deviation of samples over ``sigma``, by targets of a rule on all intervals of a level."""
    context = DenoiserContext(model=GaussianModel(std=sigma, flow_map=False), cond=condition(2))
    x = {AUDIO: stream(torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1))}
    for i in reversed(range(2**depth)):
        at = dyadic_intervals(torch.full((2,), depth), torch.full((2, 1), (i + 0.5) / 2**depth), {AUDIO: shift})
        x = move_streams(x, rule(context, x, at), at.t, at.r)
    low, high = x[AUDIO].latents.flatten().tolist()
    return (high - low) / sigma


@pytest.mark.parametrize(
    ("sigma", "shift", "depth", "std"),
    [
        (0.15, 1.0, 3, 0.993),
        (0.15, 3.0, 3, 0.878),
        (0.15, 5.0, 3, 0.737),
        (0.15, 3.0, 5, 0.998),
        (0.15, 5.0, 5, 0.993),
        (0.5, 3.0, 3, 0.999),
        (0.5, 5.0, 3, 0.999),
        (0.5, 3.0, 5, 1.000),
        (0.5, 5.0, 5, 1.000),
        (1.0, 3.0, 3, 0.998),
        (1.0, 5.0, 3, 0.994),
        (1.0, 3.0, 5, 1.000),
        (1.0, 5.0, 5, 1.000),
    ],
)
def test_the_midpoint_rule_keeps_the_spread_under_a_time_shift(sigma, shift, depth, std):
    """The middle of the schedule's index has the same order and 5 to 60 times the error: 0.963 at 0.5, shift 3."""
    found = composed_std(midpoint_target, sigma, shift, depth)
    assert found == pytest.approx(std, abs=1e-3)
    assert sigma < 0.5 or found > 0.99


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_two_midpoints_are_closer_than_one_under_any_shift(shift):
    one, two = (abs(1 - composed_std(rule, 0.15, shift, 3)) for rule in (midpoint_target, two_midpoints_target))
    assert two < 0.26 * one


def test_coarse_levels_split_at_the_middle_of_the_index():
    """The few-step mode trains these two halves: they are intervals of the level below."""
    x, is_finest = states(), torch.zeros(64, dtype=torch.bool)
    at = next(every_interval(1, 5.0))
    other = Intervals(t=at.t, r=at.r, m={AUDIO: (at.t[AUDIO] + at.r[AUDIO]) / 2})
    teacher = exact(flow_map=False)
    target = shortcut_target(teacher, x, at, is_finest)[AUDIO].double()
    torch.testing.assert_close(target, halves_target(teacher, x, at)[AUDIO], atol=1e-6, rtol=0)
    assert not torch.allclose(target, halves_target(teacher, x, other)[AUDIO], atol=1e-3)


def test_intervals_are_dyadic_in_the_shifted_index():
    depth = torch.tensor([0, 1, 3])
    at = dyadic_intervals(depth, torch.tensor([[0.1, 0.99], [0.1, 0.5], [0.0, 0.99]]), {AUDIO: 1.0, VIDEO: 5.0})
    assert at.t[AUDIO].tolist() == [[1, 1], [0.5, 1], [0.125, 1]]
    assert at.r[AUDIO].tolist() == [[0, 0], [0, 0.5], [0, 0.875]]
    assert at.m[AUDIO].tolist() == [[0.5, 0.5], [0.25, 0.75], [0.0625, 0.9375]]
    for level in "tmr":
        a = getattr(at, level)
        torch.testing.assert_close(a[VIDEO], 5 * a[AUDIO] / (1 + 4 * a[AUDIO]))


def test_every_coarse_depth_is_drawn_equally_and_the_finest_only_where_asked():
    finest = torch.arange(4000) % 4 == 0
    depth = draw_depth(5, finest, seed=0, name="depth", samples=torch.arange(4000))
    assert bool((depth[finest] == 5).all())
    share = torch.bincount(depth[~finest]) / 3000
    assert share.tolist() == pytest.approx([0.2] * 5, abs=0.04)


def test_coarse_depths_near_the_finest_can_be_drawn_more_often():
    finest = torch.arange(4000) % 4 == 0
    depth = draw_depth(4, finest, seed=0, name="depth", samples=torch.arange(4000), power=0.5)
    assert bool((depth[finest] == 4).all())
    share = torch.bincount(depth[~finest]) / 3000
    torch.testing.assert_close(share, torch.tensor([1.0, 3.0, 5.0, 7.0]) / 16, atol=0.03, rtol=0)


def test_guidance_enters_at_the_finest_level_only():
    x, is_finest = states(), torch.arange(64) < 10
    at = next(every_interval(2, 1.0))
    guided = DenoiserContext(model=GaussianModel(mean=1.0, null_mean=0.0), cond=condition(64), guidance=3.0)
    target = shortcut_target(guided, x, at, is_finest)[AUDIO].double()
    torch.testing.assert_close(target[10:], halves_target(guided.unguided(), x, at)[AUDIO][10:])
    torch.testing.assert_close(target[:10], midpoint_target(guided, x, at)[AUDIO][:10])
    assert not torch.allclose(target[:10], midpoint_target(guided.unguided(), x, at)[AUDIO][:10])


def test_an_exact_few_step_mode_has_no_shortcut_loss():
    clean = states(1)
    eps = {AUDIO: torch.randn(64, 2, 3, generator=torch.Generator().manual_seed(2))}
    at, coarse = next(every_interval(1, 5.0)), torch.zeros(64, dtype=torch.bool)
    x = add_noise(clean, eps, at.t)
    target = shortcut_target(exact(), x, at, coarse)

    def loss(student: DenoiserContext) -> torch.Tensor:
        return shortcut_loss(student.velocity(x, at.t, at.r), target, clean, at)[0].values

    assert float(loss(exact()).max()) < 1e-10
    assert float(loss(exact(flow_map=False)).min()) > 1e-4
