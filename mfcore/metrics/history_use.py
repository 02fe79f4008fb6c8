"""History use: the error with the history of another clip over the error with the true history."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mfcore.flow import TimeConfig, add_noise
from mfcore.objectives.flow_matching import draw_noise, draw_noise_levels, flow_matching_loss, flow_matching_terms
from mfcore.solver import DenoiserContext, Mode, history_of
from mfcore.types import AVBatch, Stream, VelocityModel


@torch.no_grad()
def mode_history_use(
    model: VelocityModel, batch: AVBatch, config: TimeConfig, *, mode: Mode, trust: float | None, seed: int = 0
) -> dict[str, float]:
    """Return error with another clip's history / error with the true one, per modality; 1: history is ignored.

    The error is mean (u(x_t, t, r) - (eps - x_0))^2 at the noise levels of training. In the multi-step mode r = t, so
    it is the flow-matching loss (METHOD 9). In the few-step mode r = 0: one call from t to the data. ``trust`` labels
    the history. Raises ValueError for one clip, or for clips of one chunk, which have no history.
    """
    if len(batch.samples) < 2 or batch.chunks < 2:
        raise ValueError("history use compares a clip with another one: give two or more clips of two or more chunks")
    eps = draw_noise(batch.streams, seed, "history_use", batch.samples)
    t = draw_noise_levels(config, batch.streams, seed=seed, name="history_use/level", samples=batch.samples)
    r = t if mode == "multi" else {m: torch.zeros_like(x) for m, x in t.items()}
    label = None if trust is None else torch.full((len(batch.samples),), trust, device=batch.cond.caption.device)

    def errors(history: Mapping[str, Stream]) -> dict[str, Tensor]:
        context = DenoiserContext(model=model, cond=batch.cond).append_history(history_of(history), label)
        u = context.velocity(add_noise(batch.streams, eps, t), t, r)
        terms = flow_matching_loss(u, batch.streams, eps, t)
        # The first chunk has no history.
        return {term.modality: term.values[:, 1:].mean() for term in terms}

    other_history = {m: s.with_latents(s.latents.roll(1, dims=0)) for m, s in batch.streams.items()}
    own, other = errors(batch.streams), errors(other_history)
    return {m: float(other[m] / own[m]) for m in own}


def history_use(model: VelocityModel, batch: AVBatch, config: TimeConfig, seed: int) -> dict[str, float]:
    """Return loss on another clip's history / loss on the true one, per modality; 1: history is ignored."""
    losses = history_losses(model, batch, config, seed)
    return {m: loss["other"] / loss["own"] for m, loss in losses.items()}


@torch.no_grad()
def history_losses(model: VelocityModel, batch: AVBatch, config: TimeConfig, seed: int) -> dict[str, dict[str, float]]:
    """Return the mean flow-matching loss per modality after the "own" history and that of an "other" clip."""
    if len(batch.samples) < 2:
        raise ValueError("history use compares a clip with another one: give a batch of at least two clips")
    eps = draw_noise(batch.streams, seed, "history_use", batch.samples)
    t = draw_noise_levels(config, batch.streams, seed=seed, name="history_use/level", samples=batch.samples)
    shuffled = {m: s.with_latents(s.latents.roll(1, dims=0)) for m, s in batch.streams.items()}
    own, other = (
        flow_matching_terms(
            DenoiserContext(model=model, cond=batch.cond).append_history(history_of(h), None), batch.streams, eps, t
        )
        for h in (batch.streams, shuffled)
    )
    return {
        a.modality: {"own": float(a.values.mean()), "other": float(b.values.mean())}
        for a, b in zip(own, other, strict=True)
    }
