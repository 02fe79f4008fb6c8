"""The path: conversions are inverse to each other, shifts compose, levels follow their law."""

import itertools

import pytest
import torch

from mfcore.flow import (
    TimeConfig,
    expand_levels,
    interpolate,
    move_streams,
    noise_streams,
    shift_time,
    step_along,
    training_times,
    velocity,
)
from mfcore.types import AUDIO, VIDEO
from tests.helpers.analytic_models import stream


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_conversions_round_trip():
    x0, eps, t = normal(1000), normal(1000, seed=1), torch.linspace(0, 1, 1000)
    xt, v = interpolate(x0, eps, t), velocity(x0, eps)
    near = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(xt - t * v, x0, **near)
    torch.testing.assert_close(xt + (1 - t) * v, eps, **near)
    r = t * 0.3
    torch.testing.assert_close(step_along(xt, v, t, r), interpolate(x0, eps, r), **near)
    torch.testing.assert_close(step_along(xt, v, t, torch.zeros_like(t)), x0, **near)


def test_time_zero_is_data_and_one_is_noise():
    x0, eps = normal(5), normal(5, seed=1)
    assert torch.equal(interpolate(x0, eps, torch.tensor(0.0)), x0)
    assert torch.equal(interpolate(x0, eps, torch.tensor(1.0)), eps)


def test_shifts_compose_and_keep_the_ends():
    t = torch.linspace(0, 1, 101)
    for a, b in itertools.product((0.5, 1.0, 3.0, 5.0), repeat=2):
        torch.testing.assert_close(shift_time(shift_time(t, b), a), shift_time(t, a * b), atol=1e-6, rtol=0)
        torch.testing.assert_close(shift_time(shift_time(t, a), 1 / a), t, atol=1e-6, rtol=0)
        assert shift_time(t, a)[[0, -1]].tolist() == [0.0, 1.0]
    assert float(shift_time(torch.tensor(0.5), 5.0)) == pytest.approx(5 / 6)  # more noise


def test_noise_and_steps_use_the_levels_per_chunk_and_modality():
    x = {AUDIO: stream(normal(2, 3, 4), first=5), VIDEO: stream(normal(2, 3, 1, 2, 2), first=5)}
    eps = {m: torch.zeros_like(s.latents) for m, s in x.items()}
    t = {AUDIO: torch.tensor([[0.0, 0.5, 1.0]] * 2), VIDEO: torch.tensor([[0.25] * 3, [0.75] * 3])}
    noisy = noise_streams(x, eps, t)
    torch.testing.assert_close(noisy[AUDIO], x[AUDIO].latents * torch.tensor([1, 0.5, 0]).reshape(1, 3, 1))
    torch.testing.assert_close(noisy[VIDEO], x[VIDEO].latents * torch.tensor([0.75, 0.25]).reshape(2, 1, 1, 1, 1))
    u = {m: torch.ones_like(s.latents) for m, s in x.items()}
    moved = move_streams(x, u, t, {m: level / 2 for m, level in t.items()})
    torch.testing.assert_close(moved[AUDIO].latents, x[AUDIO].latents - torch.tensor([0, 0.25, 0.5]).reshape(1, 3, 1))


def test_a_level_reaches_every_latent_of_its_chunk():
    chunk = torch.tensor([7, 7, 8, 8, 8])
    out = expand_levels(torch.tensor([[0.2, 0.9]]), chunk, torch.empty(1, 5, 1, 2, 2))
    assert out.shape == (1, 5, 1, 1, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2, 0.2, 0.9, 0.9, 0.9]))


def test_small_steps_are_exact_for_bfloat16_latents():
    x = {AUDIO: stream(normal(1, 1, 4).bfloat16())}
    t, r = ({AUDIO: torch.tensor([[value]])} for value in (1.0, 1 - 1 / 500))
    moved = move_streams(x, {AUDIO: torch.ones(1, 1, 4)}, t, r)
    torch.testing.assert_close(x[AUDIO].latents.float() - moved[AUDIO].latents.float(), torch.full((1, 1, 4), 1 / 500))


def test_training_levels_follow_their_law():
    draws = torch.rand(40000, 3, generator=torch.Generator().manual_seed(0))
    config = TimeConfig(shift={VIDEO: 5.0, AUDIO: 1.0})
    t, plain = training_times(config, draws, VIDEO), training_times(config, draws, AUDIO)
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    torch.testing.assert_close(t, shift_time(plain, 5.0), atol=1e-6, rtol=0)
    # logit-normal beyond 0.98: 5e-5; the uniform tenth puts 0.2% there
    assert float((plain > 0.98).float().mean()) == pytest.approx(0.002, abs=0.0007)
    middle = torch.logit(plain[draws[:, 0] >= config.uniform_share].double())
    assert (float(middle.mean()), float(middle.std())) == pytest.approx((0, 1), abs=0.02)


def test_training_times_include_one():
    config = TimeConfig(shift={VIDEO: 5.0})
    assert float(training_times(config, torch.zeros(3), VIDEO)) == 1.0


def test_modalities_share_their_level_unless_independent():
    draws = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    shared, independent = (TimeConfig(shift={VIDEO: 1.0, AUDIO: 1.0}, independent=i) for i in (False, True))
    assert torch.equal(training_times(shared, draws, VIDEO), training_times(shared, draws, AUDIO))
    both = torch.stack([training_times(independent, draws, m) for m in (VIDEO, AUDIO)])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.15  # the law is shared, the quantile is not
    with pytest.raises(ValueError, match="shift.video=0"):
        TimeConfig(shift={VIDEO: 0.0})
