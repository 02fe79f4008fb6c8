"""Rollout: its chunks, its cache, and continuation from a snapshot."""

import pytest
import torch

from mfcore.rollout import coupled_starts, join_chunks, noise_starts, rollout, step_noise
from mfcore.solver import DenoiserContext, schedule, single_step_schedule
from mfcore.types import AUDIO, VIDEO
from tests.helpers.analytic_models import GaussianModel, LinearGaussian, condition, linear_clips, stream
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network

SHIFT = {VIDEO: 3.0, AUDIO: 1.0}


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_few_steps_of_an_exact_flow_map_reproduce_the_data(steps):
    start = stream(torch.tensor([0.0, 1.0]).reshape(2, 1, 1))
    chunks = rollout(
        DenoiserContext(model=GaussianModel(mean=2.0, std=0.3), cond=condition(2)),
        [{AUDIO: start}],
        schedule(steps, SHIFT),
    )
    low, high = next(iter(chunks)).clean[AUDIO].latents.flatten().tolist()
    assert (low, high - low) == pytest.approx((2.0, 0.3), abs=1e-5)


def test_each_chunk_continues_the_one_before():
    data = linear_clips(3, 4, 0, chunks=6)
    zero = ({AUDIO: stream(torch.zeros(3, 1, 4), first=k)} for k in range(5))
    chunks = rollout(DenoiserContext(model=LinearGaussian(0.5, 1.0, 0.1), cond=data.cond), zero, schedule(2, SHIFT))
    h = data.cond.voice
    with torch.no_grad():
        for chunk in chunks:
            h = 0.5 * h + 1.0  # noise 0 is the mean of the next chunk
            torch.testing.assert_close(chunk.clean[AUDIO].latents, h, atol=1e-5, rtol=0)


@torch.no_grad()
def test_coupled_history_follows_its_recursion():
    """Compare with H_k = (1 - kappa)(alpha H_{k-1} + delta) + kappa x_k + eta e."""
    alpha, delta, v, s = 0.8, 0.05, 0.2, 0.25
    data = linear_clips(3, 4, 0, chunks=6)
    eps = {AUDIO: torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))}
    plan = single_step_schedule(s, {AUDIO: 1.0})
    starts = coupled_starts(data.streams, eps, {AUDIO: plan[AUDIO][0]}, 5)
    made = rollout(DenoiserContext(model=LinearGaussian(alpha, delta, v), cond=data.cond), starts, plan)
    history = join_chunks(c.clean for c in made)[AUDIO].latents
    root = (v / ((1 - s) ** 2 * v + s**2)) ** 0.5
    kappa, eta = (1 - s) * root, s * root
    h = data.cond.voice[:, 0]
    for k in range(5):
        h = (1 - kappa) * (alpha * h + delta) + kappa * data.streams[AUDIO].latents[:, k] + eta * eps[AUDIO][:, k]
        torch.testing.assert_close(history[:, k], h, atol=1e-5, rtol=0)


def test_noise_of_a_row_depends_on_seed_chunk_and_sample_only():
    like = torch.empty(0)
    many = list(noise_starts(TIMELINE, SHAPES, range(3), seed=5, samples=torch.tensor([4, 9]), like=like))
    one = list(noise_starts(TIMELINE, SHAPES, range(1, 3), seed=5, samples=torch.tensor([9]), like=like))
    other = next(iter(noise_starts(TIMELINE, SHAPES, range(1), seed=6, samples=torch.tensor([4, 9]), like=like)))
    for m in SHAPES:
        for k in (1, 2):
            assert torch.equal(many[k][m].latents[1:], one[k - 1][m].latents)
            assert torch.equal(many[k][m].times, TIMELINE.times(m, 1, k))
        assert not torch.equal(many[0][m].latents, other[m].latents)
        assert not torch.equal(many[0][m].latents[0], many[0][m].latents[1])
        assert not torch.equal(many[0][m].latents[:, 0], many[1][m].latents[:, 0])


def test_renoising_noise_of_a_row_depends_on_seed_chunk_step_and_sample_only():
    samples = torch.tensor([4, 9])
    chunks = list(noise_starts(TIMELINE, SHAPES, range(3), seed=5, samples=samples, like=torch.empty(0)))
    whole = step_noise(5, samples)(join_chunks(chunks), 1)
    for m in SHAPES:
        parts = [step_noise(5, samples)(chunk, 1)[m] for chunk in chunks]
        assert torch.equal(whole[m], torch.cat(parts, dim=1))  # a parallel pass draws as streaming does
        assert torch.equal(parts[1][1:], step_noise(5, samples[1:])({m: chunks[1][m].rows(slice(1, 2))}, 1)[m])
        assert abs(float(whole[m].std()) - 1) < 0.3
        drawn = [parts[0], parts[1], step_noise(5, samples)(chunks[0], 2)[m], step_noise(6, samples)(chunks[0], 1)[m]]
        drawn.append(chunks[0][m].latents)
        assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@torch.no_grad()
def test_continuing_a_snapshot_equals_the_uninterrupted_rollout():
    model, data = network(), batch()
    plan = schedule(2, SHIFT)

    def starts(chunks: range):
        return noise_starts(TIMELINE, SHAPES, chunks, seed=0, samples=data.samples, like=data.cond.caption)

    whole = list(rollout(DenoiserContext(model=model, cond=data.cond), starts(range(5)), plan))
    snapshot = whole[2].context
    again = list(rollout(snapshot, starts(range(3, 5)), plan))
    for a, b in zip(whole[3:], again, strict=True):
        for m in SHAPES:
            assert torch.equal(a.clean[m].latents, b.clean[m].latents)


@torch.no_grad()
def test_the_exit_state_is_the_state_at_the_exit_level():
    model, data = network(), batch()
    noise = list(noise_starts(TIMELINE, SHAPES, range(2), seed=0, samples=data.samples, like=data.cond.caption))
    made = [
        list(rollout(DenoiserContext(model=model, cond=data.cond), noise, schedule(3, SHIFT), exit_step=j))
        for j in (None, 0, 2)
    ]
    assert all(chunk.exit_state is None for chunk in made[0])
    for k, start in enumerate(noise):
        for m in SHAPES:
            assert torch.equal(made[1][k].exit_state[m].latents, start[m].latents)  # no step before step 0
            assert not torch.equal(made[2][k].exit_state[m].latents, start[m].latents)
            assert torch.equal(made[2][k].clean[m].latents, made[0][k].clean[m].latents)  # returning it has no effect
