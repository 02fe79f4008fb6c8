"""Truths about distribution matching (TRUTHS, exact properties 5, 7 and 8)."""

import pytest
import torch

from mfcore.flow import noise_streams, velocity
from mfcore.objectives.dmd import denoise_in_one_step, dmd_terms, normalized_score_difference
from mfcore.objectives.losses import total_loss
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, constant_levels, schedule, solver_step
from mfcore.types import AUDIO, VIDEO
from tests.helpers.analytic_models import GaussianModel, condition, spread, stream
from tests.helpers.gradients import assert_same_gradient
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network

SPREAD = 0.5
PLAN = schedule(4, {VIDEO: 3.0, AUDIO: 1.0})


def model(mean: float | torch.Tensor, **changes) -> DenoiserContext:
    return DenoiserContext(model=GaussianModel(mean=mean, std=SPREAD, **changes), cond=condition(32))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pull(
    y, real: DenoiserContext, fake: DenoiserContext, *, tau: float, floor: float = 1e-3
) -> dict[str, torch.Tensor]:
    """Return g, the gradient of the student's terms at y, per element."""
    y = {m: s.with_latents(s.latents.detach().requires_grad_()) for m, s in y.items()}
    eps = {m: normal(*s.latents.shape, seed=5) for m, s in y.items()}
    levels = constant_levels(y, dict.fromkeys(y, tau))
    terms = dmd_terms(y, real=real, fake=fake, eps=eps, tau=levels, weight=1.0, floor=floor)
    loss = torch.stack([t.values.sum() for t in terms.student]).sum()
    grads = torch.autograd.grad(loss, [s.latents for s in y.values()])
    per_chunk = {m: s.latents[0, 0].numel() for m, s in y.items()}
    return {m: g * per_chunk[m] for m, g in zip(y, grads, strict=True)}


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9, 1.0])
def test_the_gap_of_two_gaussians_is_the_closed_form(tau):
    y = {AUDIO: stream(normal(32, 3, 4, seed=0))}
    floor = 1e3  # a normaliser that is the same everywhere: g times it is (v_real - v_fake) itself
    g = pull(y, model(0.2), model(0.9), tau=tau, floor=floor)[AUDIO] * floor * tau
    expected = (0.9 - 0.2) * tau**2 / spread(SPREAD**2, tau)
    torch.testing.assert_close(g, torch.full_like(g, expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_a_sample_moves_from_fake_to_real_and_has_no_gradient_where_they_agree(tau):
    y = {AUDIO: stream(normal(32, 3, 4, seed=0) * SPREAD + 0.9)}
    assert bool((pull(y, model(0.2), model(0.9), tau=tau)[AUDIO] > 0).all())  # y - g is nearer to 0.2
    assert bool((pull(y, model(1.2), model(0.9), tau=tau)[AUDIO] < 0).all())
    assert float(pull(y, model(0.9), model(0.9), tau=tau)[AUDIO].abs().max()) == 0


def test_guidance_pulls_even_where_fake_is_real():
    y = {AUDIO: stream(normal(32, 3, 4, seed=0))}
    guided = DenoiserContext(
        model=GaussianModel(mean=0.9, std=SPREAD, null_mean=0.4, null_std=SPREAD), cond=condition(32), guidance=2.0
    )
    assert bool((pull(y, guided, model(0.9), tau=0.5)[AUDIO] < 0).all())  # on, away from the null branch


def test_the_velocity_form_equals_the_data_form():
    tau = 0.6
    x0, eps = normal(32, 3, 4, seed=0), normal(32, 3, 4, seed=1)
    y = {AUDIO: stream(x0)}
    t = constant_levels(y, {AUDIO: tau})
    x = {AUDIO: y[AUDIO].with_latents(noise_streams(y, {AUDIO: eps}, t)[AUDIO])}
    v_real, v_fake = (model(m).velocity(x, t, t)[AUDIO] for m in (0.2, 0.9))
    g = normalized_score_difference(v_real, v_fake, velocity(x0, eps), y[AUDIO].chunk, floor=1e-3)
    level = torch.tensor(tau)
    real, fake = (x[AUDIO].latents - level * v for v in (v_real, v_fake))
    in_data = (fake - real) / (real - x0).abs().mean(dim=2, keepdim=True)
    torch.testing.assert_close(g, in_data, atol=1e-5, rtol=1e-5)


def test_louder_audio_does_not_change_the_gradient_of_the_video():
    def both(loudness: float) -> dict[str, torch.Tensor]:
        scale = {AUDIO: loudness}
        y = {VIDEO: stream(normal(32, 3, 2, 4, 4, seed=0)), AUDIO: stream(loudness * normal(32, 3, 4, seed=1))}
        return pull(y, model(0.2, scale=scale), model(0.9, scale=scale), tau=0.5)

    quiet, loud = both(1.0), both(10.0)
    assert torch.equal(quiet[VIDEO], loud[VIDEO])
    assert not torch.equal(quiet[AUDIO], loud[AUDIO])


def test_normalization_is_per_sample_chunk_and_modality():
    chunk = torch.tensor([3, 3, 4])
    v_real = torch.ones(2, 3, 4)
    v_fake, v_sample = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    v_real[1], v_real[0, 2] = 8.0, 4.0
    g = normalized_score_difference(v_real, v_fake, v_sample, chunk, floor=1e-3)
    torch.testing.assert_close(g, torch.ones(2, 3, 4))
    g = normalized_score_difference(v_real, v_fake, v_real, chunk, floor=0.5)
    assert float(g[0, 0, 0]) == 2.0


def test_each_loss_has_a_gradient_for_its_own_network_only():
    y_mean, fake_mean, real_mean = (torch.tensor(m, requires_grad=True) for m in (0.5, 0.9, 0.2))
    y = {AUDIO: stream(normal(32, 3, 4, seed=0) + y_mean)}
    eps = {AUDIO: normal(32, 3, 4, seed=1)}
    tau = constant_levels(y, {AUDIO: 0.5})
    terms = dmd_terms(y, real=model(real_mean), fake=model(fake_mean), eps=eps, tau=tau, weight=0.25)
    owners = [y_mean, fake_mean, real_mean]
    student, fake = (
        torch.autograd.grad(total_loss(part), owners, allow_unused=True) for part in (terms.student, terms.fake)
    )
    assert student[0] is not None
    assert student[1:] == (None, None)
    assert fake[1] is not None
    assert (fake[0], fake[2]) == (None, None)
    assert [t.weight for t in terms.student + terms.fake] == [0.25, 1.0]  # the fake score's loss is its own


@pytest.mark.parametrize(
    ("ratio", "overshoot", "tolerance"), [(1, 0.29, 0.03), (2, 0.065, 0.02), (3, 0.006, 0.004), (4, 0.0, 0.01)]
)
def test_a_slow_fake_score_makes_the_student_overshoot(ratio, overshoot, tolerance):
    """One-parameter student and fake score, real mean 0: how far beyond 0 the student's mean swings, from 1.

    At tau = 1 the student's gradient is fake / floor, the fake's 2 (fake - student): the rates below make the second
    ``ratio`` times as fast as the first.
    """
    student, fake = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    noise = normal(16, 1, 4, seed=0)
    floor, rate = 100.0, 0.02
    noise = torch.cat([noise, -noise])  # its mean is exactly 0
    eps, lowest = {AUDIO: noise.roll(1, 0)}, 0.0
    for _ in range(400):
        y = {AUDIO: stream(student + SPREAD * noise)}
        tau = constant_levels(y, {AUDIO: 1.0})
        terms = dmd_terms(y, real=model(0.0), fake=model(fake), eps=eps, tau=tau, weight=1.0, floor=floor)
        (pull_student,) = torch.autograd.grad(total_loss(terms.student), student)
        (pull_fake,) = torch.autograd.grad(total_loss(terms.fake), fake)
        with torch.no_grad():
            student -= rate * floor * pull_student
            fake -= ratio * rate / 2 * pull_fake
        lowest = min(lowest, student.item())
    assert -lowest == pytest.approx(overshoot, abs=tolerance)


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_a_sample_has_the_gradient_of_its_last_steps_on_a_history_that_is_data(exit_step):
    """Equal to these steps on all chunks in parallel, from the states at the exit level."""
    net, data = network(), batch(chunks=4)
    starts = list(noise_starts(TIMELINE, SHAPES, range(4), seed=0, samples=data.samples, like=data.cond.caption))
    chunks = list(rollout(DenoiserContext(model=net, cond=data.cond), starts, PLAN, exit_step=exit_step))
    made, exit_state = join_chunks(c.clean for c in chunks), join_chunks(c.exit_state for c in chunks)
    assert not any(s.latents.requires_grad for s in exit_state.values())
    history = {m: s.with_latents(s.latents.detach()) for m, s in made.items()}
    again, context = exit_state, DenoiserContext(model=net, cond=data.cond).append_history(history, None).detach()
    for j in range(exit_step, 4):
        t = constant_levels(again, {m: levels[j] for m, levels in PLAN.items()})
        r = constant_levels(again, {m: levels[j + 1] for m, levels in PLAN.items()})
        again = solver_step(context, again, t, r, mode="few")
    assert_same_gradient(made, again, net)


def test_the_gradient_of_a_jump_is_that_of_its_single_call():
    """From the exit state of a rollout; earlier calls have no gradient."""
    net, data = network(), batch(chunks=4)
    starts = list(noise_starts(TIMELINE, SHAPES, range(4), seed=0, samples=data.samples, like=data.cond.caption))
    chunks = list(rollout(DenoiserContext(model=net, cond=data.cond), starts, PLAN, exit_step=1))
    exit_state, history = join_chunks(c.exit_state for c in chunks), join_chunks(c.clean for c in chunks)
    context = DenoiserContext(model=net, cond=data.cond).append_history(history, None).detach()
    t = constant_levels(exit_state, {m: levels[1] for m, levels in PLAN.items()})
    r = constant_levels(exit_state, {m: levels[-1] for m, levels in PLAN.items()})
    again = solver_step(
        context, {m: s.with_latents(s.latents.detach()) for m, s in exit_state.items()}, t, r, mode="few"
    )
    assert_same_gradient(denoise_in_one_step(context, exit_state, PLAN, 1), again, net)


def test_a_jump_is_one_call_and_equals_the_schedule_for_a_flow_map():
    calls: list[float] = []
    inner = GaussianModel(mean=0.3, std=SPREAD)

    def counting(x, t, r, cond, *, cache=None, store=False, trust=None):
        calls.append(float(r[AUDIO][0, 0]))
        return inner(x, t, r, cond, cache=cache, store=store, trust=trust)

    exit_state = {AUDIO: stream(normal(2, 1, 3, seed=0))}
    landed = denoise_in_one_step(DenoiserContext(model=counting, cond=condition(2)), exit_state, PLAN, 1)
    assert calls == [0.0]
    x = exit_state
    for j in (1, 2, 3):
        t, r = (constant_levels(x, {AUDIO: PLAN[AUDIO][i]}) for i in (j, j + 1))
        x = solver_step(DenoiserContext(model=inner, cond=condition(2)), x, t, r, mode="few")
    torch.testing.assert_close(landed[AUDIO].latents, x[AUDIO].latents, atol=1e-5, rtol=0)
