"""Flow matching: closed forms, and training of a small network in a world with known minimal loss."""

import math
from dataclasses import replace

import pytest
import torch

from mfcore.flow import TimeConfig
from mfcore.metrics.history_use import history_use
from mfcore.model.branch import gaussian_flow
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.transformer import build_model
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective, flow_matching_terms
from mfcore.objectives.losses import LossTerm, StepInfo, chunk_means, chunk_thirds, summarize_terms, total_loss
from mfcore.solver import DenoiserContext, constant_levels
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream
from tests.helpers.analytic_models import GaussianModel, condition, spread, stream
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network

TIME = TimeConfig(shift={VIDEO: 2.0, AUDIO: 1.0})
START = StepInfo(seed=0, step=0, stage_step=0)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_the_true_field_has_the_minimal_loss(t):
    """R / ((1 - t)^2 R + t^2), and any other field more."""
    clean = {AUDIO: stream(0.3 + 0.5 * normal(400, 4, 50, seed=0))}
    eps, level = {AUDIO: normal(400, 4, 50, seed=1)}, constant_levels(clean, {AUDIO: t})
    true, shifted, wide = (
        float(flow_matching_terms(DenoiserContext(model=m, cond=condition(400)), clean, eps, level)[0].values.mean())
        for m in (GaussianModel(mean=0.3, std=0.5), GaussianModel(mean=0.6, std=0.5), GaussianModel(mean=0.3, std=0.8))
    )
    assert true == pytest.approx(0.25 / spread(0.25, t), rel=0.01)
    assert shifted > true
    assert wide > true or t == 1.0  # pure noise does not depend on the spread


def test_a_term_is_a_mean_over_one_chunk_of_one_sample_and_modality():
    squares, chunk = torch.zeros(2, 5, 3, 2, 2), torch.tensor([4, 4, 5, 5, 5])
    squares[0, :2], squares[1, 4] = 2.0, 3.0
    torch.testing.assert_close(chunk_means(squares, chunk), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    even = torch.tensor([4, 4, 5, 5])  # chunks that hold as many latents each
    torch.testing.assert_close(chunk_means(squares[:, 1:], even), torch.tensor([[1.0, 0.0], [0.0, 1.5]]))


def test_total_loss_weights_and_averages_the_terms():
    a = LossTerm(
        name="a", modality=AUDIO, values=torch.tensor([[1.0, 3.0]]), weight=0.5, level=torch.tensor([[0.1, 0.9]])
    )
    b = LossTerm(name="b", modality=VIDEO, values=torch.tensor([[4.0, 4.0], [4.0, 4.0]]))
    assert float(total_loss([a, b])) == 0.5 * 2 + 4
    assert summarize_terms([a, b]) == {
        "a/audio": 2.0,
        "a/audio/t0": 1.0,
        "a/audio/t3": 3.0,
        "a/audio/chunk_first": 1.0,
        "a/audio/chunk_last": 3.0,
        "b/video": 4.0,
        "b/video/chunk_first": 4.0,
        "b/video/chunk_last": 4.0,
    }
    with pytest.raises(ValueError, match="no loss term"):
        total_loss([])


def test_a_summary_separates_the_first_chunks_from_the_last():
    drift = LossTerm(name="a", modality=VIDEO, values=torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 6]))
    found = summarize_terms([drift])
    assert found == {
        "a/video": 21 / 12,
        "a/video/chunk_first": 0.75,
        "a/video/chunk_middle": 1.75,
        "a/video/chunk_last": 2.75,
    }
    assert [chunk_thirds(n).tolist() for n in (1, 2, 3)] == [[0], [0, 2], [0, 1, 2]]


def test_a_sample_has_the_same_terms_in_any_batch():
    model, data = network(), batch(rows=3)
    objective = FlowMatchingObjective(FlowMatchingConfig(time=TIME))
    whole = objective({"student": model}, data, START)["student"]
    index = torch.tensor([2, 0])
    part = objective({"student": model}, data.rows(index), START)["student"]
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a.values[index], b.values, atol=1e-5, rtol=1e-5)


def test_history_use_needs_another_clip():
    with pytest.raises(ValueError, match="at least two"):
        history_use(network(), batch(rows=1), TIME, seed=0)


# A world of known uncertainty: a face (first frame) fixes the mean of every video and audio latent.
WIDTH = 4
SPREAD = 0.3
CHUNKS = 2


def faces(number: int, rows: int = 16) -> AVBatch:
    """Return latents N(face, SPREAD^2); only the first frame contains the face, so audio depends on video."""
    face = normal(rows, WIDTH, seed=2 * number).sign()
    draw = torch.Generator().manual_seed(2 * number + 1)
    streams: dict[str, Stream] = {}
    for m, space in ((VIDEO, (1, 1)), (AUDIO, ())):
        mean = face.reshape(rows, 1, WIDTH, *(1,) * len(space))
        n = TIMELINE.count(m, CHUNKS)
        noise = SPREAD * torch.randn(rows, n, WIDTH, *space, generator=draw)
        streams[m] = Stream(
            latents=mean + noise, times=TIMELINE.times(m, CHUNKS), chunk=TIMELINE.chunk_index(m, CHUNKS)
        )
    nothing = condition(rows, caption=False)
    cond = Condition(
        **vars(nothing)
        | {
            "first_frame": face.reshape(rows, WIDTH, 1, 1),
            "voice": torch.zeros(rows, 1, WIDTH),
            "voice_mask": torch.zeros(rows, dtype=torch.bool),
        }
    )
    return AVBatch(streams=streams, cond=cond, samples=torch.arange(rows) + rows * number)


def small_network():
    return build_model(
        ModelConfig(
            branches={m: BranchConfig(channels=WIDTH) for m in SHAPES},
            dim=32,
            layers=1,
            heads=2,
            text_dim=1,
            chunk_seconds=0.5,
            window_chunks=1,
        ),
        seed=0,
    )


@torch.no_grad()
def test_an_initial_network_is_the_field_of_one_gaussian():
    """The initialization contains the spread of whitened latents (METHOD 2, TRUTHS 2)."""
    model, data = small_network(), faces(0, rows=2)
    t = constant_levels(data.streams, {VIDEO: 0.3, AUDIO: 0.9})
    u = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None).velocity(data.streams, t, t)
    known, _ = GaussianModel(std=model.config.branches[VIDEO].data_std)(data.streams, t, t, condition(2))
    for m in SHAPES:
        torch.testing.assert_close(u[m], known[m], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_anchored_network_is_the_field_of_a_gaussian_about_the_first_frame():
    """The exact flow of N(m, s^2): from t to r and to 0, x_0 keeps its quantile."""
    std, anchored = 0.3, 2
    config = BranchConfig(channels=3, size=(2, 2), patch=(1, 2), data_std=std, anchor=anchored)
    model = build_model(replace(small_network().config, branches={VIDEO: config}), seed=0)
    first = torch.randn(2, 3, 2, 2)
    mean = torch.cat([first[:, :anchored], torch.zeros(2, 3 - anchored, 2, 2)], dim=1)[:, None]
    x0 = mean + std * torch.randn(2, 1, 3, 2, 2)
    cond = replace(condition(2), first_frame=first)
    clock = Stream(latents=x0, times=torch.zeros(1, dtype=torch.float64), chunk=torch.zeros(1, dtype=torch.int64))
    for top, bottom in ((0.9, 0.4), (0.5, 0.0), (1.0, 0.0)):
        spreads = [math.sqrt((1 - level) ** 2 * std**2 + level**2) for level in (top, bottom)]
        place = (x0 - mean) / std
        x_t, x_r = ((1 - lv) * mean + s * place for lv, s in zip((top, bottom), spreads, strict=True))
        t, r = ({VIDEO: torch.full((2, 1), level)} for level in (top, bottom))
        u, _ = model({VIDEO: clock.with_latents(x_t)}, t, r, cond)
        torch.testing.assert_close(x_t - (top - bottom) * u[VIDEO], x_r, atol=1e-5, rtol=1e-5)


def held_out_over_least(model, objective: FlowMatchingObjective) -> dict[str, float]:
    """Return held-out loss with fixed noise and levels over the minimal loss, per modality."""
    with torch.no_grad():
        terms = objective({"student": model}, faces(10**6, rows=128), START)["student"]
    return {t.modality: float(t.values.mean() / (SPREAD**2 / spread(SPREAD**2, t.level)).mean()) for t in terms}


def test_a_small_network_trains_to_near_the_minimal_loss():
    model, objective = small_network(), FlowMatchingObjective(FlowMatchingConfig(time=TIME))
    before = held_out_over_least(model, objective)
    steps, optimizer = 150, torch.optim.Adam(model.parameters(), 0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        terms = objective({"student": model}, faces(step), StepInfo(seed=0, step=step, stage_step=step))["student"]
        optimizer.zero_grad()
        total_loss(terms).backward()
        optimizer.step()
    after = held_out_over_least(model, objective)
    for m in SHAPES:
        assert before[m] > 1.5
        assert 0.9 < after[m] < 1.25


@pytest.mark.parametrize("std", [0.3, 0.5, 1.7])
def test_the_flow_of_a_gaussian_follows_from_its_covariances(std):
    """By conditioning: velocity and x_t have covariance t - (1 - t) s^2, and D_t is the variance of x_t."""
    draws = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = draws.sort(0, descending=True)[0]
    variance, after = (((1 - level) * std) ** 2 + level**2 for level in (t, r))
    together = t - (1 - t) * std**2
    gain, spread = gaussian_flow(t, r, std)
    torch.testing.assert_close(gain, (1 - (after / variance).sqrt()) / (t - r))  # x_r = sqrt(D_r / D_t) x_t
    torch.testing.assert_close(spread, (1 + std**2 - together**2 / variance).sqrt())
    torch.testing.assert_close(gaussian_flow(t, t, std)[0], together / variance)
