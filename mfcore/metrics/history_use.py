"""Does a mode still read its history? Asked of the mode's own call, at the noise levels of training."""

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
    """Error with another clip's history / error with the true one, per modality: 1 means that history is ignored.

    The error is mean (u(x_t, t, r) - (eps - x_0))^2: r = t in the multi-step mode, where it is the flow-matching loss
    (METHOD 9), r = 0 in the few-step mode, which finishes from t in one call. ``trust`` labels the history. ValueError
    for one clip alone, or for clips of one chunk, which have no history.
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
        # The first chunk has no history, whoever's it is.
        return {term.modality: term.values[:, 1:].mean() for term in terms}

    other = {m: s.with_latents(s.latents.roll(1, dims=0)) for m, s in batch.streams.items()}
    true, wrong = errors(batch.streams), errors(other)
    return {m: float(wrong[m] / true[m]) for m in true}


def history_use(model: VelocityModel, batch: AVBatch, config: TimeConfig, seed: int) -> dict[str, float]:
    """Loss on another clip's history over loss on the true one, per modality: 1 means that history is ignored."""
    losses = history_losses(model, batch, config, seed)
    return {m: some["other"] / some["own"] for m, some in losses.items()}


@torch.no_grad()
def history_losses(model: VelocityModel, batch: AVBatch, config: TimeConfig, seed: int) -> dict[str, dict[str, float]]:
    """Mean flow-matching loss by modality, of every clip after its "own" history and after that of an "other" clip."""
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
