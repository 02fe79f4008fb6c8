"""Distribution matching distillation (DMD) of the few-step samples (METHOD 6, steps 4 and 5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.flow import add_noise, velocity
from mfcore.objectives.flow_matching import flow_matching_loss
from mfcore.objectives.losses import LossTerm, chunk_means
from mfcore.solver import DenoiserContext, Schedule, constant_levels, solver_step
from mfcore.types import NoiseLevels, Stream, Streams


def denoise_in_one_step(
    context: DenoiserContext, exit_state: Streams, plan: Schedule, exit_step: int
) -> dict[str, Stream]:
    """Return the state at t = 0 from the exit state at level t_j, by one call with gradient.

    An ablation: samplers that re-noise x_0 predictions end a rollout like this. A flow map finishes its schedule.
    """
    t = constant_levels(exit_state, {m: levels[exit_step] for m, levels in plan.items()})
    r = constant_levels(exit_state, {m: levels[-1] for m, levels in plan.items()})
    return dict(solver_step(context, exit_state, t, r, mode="few"))


def normalized_score_difference(
    v_real: Tensor, v_fake: Tensor, v_sample: Tensor, chunk: Int64[Tensor, " n"], *, floor: float
) -> Tensor:
    """Return g = (v_real - v_fake) / max(mean |v_real - v_sample|, floor), mean per sample, chunk and modality.

    ``v_sample = eps - y``. g points from real to fake in x_0 (the level cancels), so samples move along -g.
    """
    scale = chunk_means((v_real - v_sample).abs(), chunk).clamp_min(floor)
    per_latent = scale[:, to_device_of(chunk - chunk[0], scale)]
    return (v_real - v_fake) / per_latent.reshape(per_latent.shape + (1,) * (v_real.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class DmdTerms:
    """Terms of the student, and the flow-matching terms of the fake score from the same evaluation."""

    student: list[LossTerm]
    fake: list[LossTerm]


def dmd_terms(
    y: Streams,
    *,
    real: DenoiserContext,
    fake: DenoiserContext,
    eps: dict[str, Tensor],
    tau: NoiseLevels,
    weight: float,
    floor: float = 1e-3,
) -> DmdTerms:
    """Return 1/2 mean (y - stopgrad(y - g))^2 for the student and flow matching on stopgrad(y) for the fake score.

    Args:
        y: Few-step samples, with gradient.
        real: Guided multi-step mode, evaluated without gradient.
        fake: Fake score; receives the gradient of its terms only.
        eps: Noise of the score evaluation.
        tau: Noise levels of the score evaluation.
        weight: Weight of the student's terms.
        floor: Lower bound of the normalizer of g.
    """
    detached = {m: s.with_latents(s.latents.detach()) for m, s in y.items()}
    x = add_noise(detached, eps, tau)
    with torch.no_grad():
        v_real = real.velocity(x, tau, tau)
    v_fake = fake.velocity(x, tau, tau)
    student: list[LossTerm] = []
    for m, s in y.items():
        v_sample = velocity(detached[m].latents, eps[m])
        g = normalized_score_difference(v_real[m].float(), v_fake[m].detach().float(), v_sample, s.chunk, floor=floor)
        target = (s.latents - g).detach()
        values = chunk_means(0.5 * (s.latents - target) ** 2, s.chunk)
        student.append(LossTerm(name="dmd", modality=m, values=values, weight=weight, level=tau[m]))
    return DmdTerms(student=student, fake=flow_matching_loss(v_fake, detached, eps, tau, name="fake_score"))
