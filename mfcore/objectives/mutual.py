"""Mutual Forcing: the two modes of one network train each other (METHOD 6).

The few-step mode generates the history that the multi-step mode is trained on. The multi-step mode is the teacher of
the few-step mode. Rows of a batch differ in their history:

========  ==========================================  ==================  ==========================
row       history                                     clean chunk z       losses
========  ==========================================  ==================  ==========================
real      the clip's own chunks (s = 0)               the clip's          flow matching, ShortCut
coupled   the clip noised to s, finished in one call  the clip's          flow matching, ShortCut
free      rolled out from noise (s = 1)               the rolled-out one  ShortCut, DMD
literal   rolled out from noise (s = 1)               the clip's          flow matching, ShortCut
forced    the clip's own chunks (s = 0)               the clip's          all; DMD on single chunks
========  ==========================================  ==================  ==========================

``literal`` rows make history useless (METHOD 6) and ``forced`` rows cut the loop; only ``baselines.py`` uses them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.flow import add_noise
from mfcore.objectives.dmd import denoise_in_one_step, dmd_terms
from mfcore.objectives.flow_matching import draw_noise, draw_noise_levels, flow_matching_loss, flow_matching_terms
from mfcore.objectives.histories import (
    Histories,
    StepDraws,
    draw_step,
    replace_rows,
    rows_of_kind,
    trust_label,
    write_histories,
)
from mfcore.objectives.losses import LossTerm, StepInfo
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.objectives.shortcut import draw_depth, dyadic_intervals, shortcut_loss, shortcut_target
from mfcore.rng import uniform_rows
from mfcore.solver import DenoiserContext, VelocityQuery, history_of, query_velocities
from mfcore.types import AVBatch, Condition, Stream, Streams, VelocityModel

MIN_TAU = 0.02  # below it, the difference of the scores is network error

LossQuery = tuple[VelocityQuery, Callable[[dict[str, Tensor]], list[LossTerm]]]
"""A query to the student, and the loss of its velocity."""


class MutualForcingObjective:
    """Objective of the mutual stage."""

    needs = ("student", "ema", "fake")

    def __init__(self, config: MutualConfig) -> None:
        self.config = config

    def __call__(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> dict[str, list[LossTerm]]:
        """Return the terms of the first round."""
        return next(self.rounds(models, batch, info))

    def rounds(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> Iterator[dict[str, list[LossTerm]]]:
        """Yield the terms of the step, then ``fake_updates - 1`` times those of the fake score at new levels."""
        terms, fake_rounds = self._step(models, batch, info)
        yield terms  # by now only ``fake_rounds`` references tensors of the step
        for fake_terms in fake_rounds:
            yield {"fake": fake_terms()}

    def _step(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> tuple[dict[str, list[LossTerm]], list[Callable[[], list[LossTerm]]]]:
        config, step = self.config, info.stage_step
        draws, free = draw_step(config, batch.streams, info), rows_of_kind(config, batch, step, "free")
        scored = rows_of_kind(config, batch, step, "free", "forced")
        has_scores = len(scored) > 0 and step >= config.fake_from and config.dmd_weight > 0
        scale = config.dmd_scale(step) if has_scores else 0.0
        samples = "distilled" if scale else "scored" if has_scores else "unused"
        history = write_histories(config, models["student"], batch, draws=draws, info=info, samples=samples)  # step 1
        clean = _clean_chunks(batch.streams, history.streams, free)  # step 2
        teacher = self._teacher(models["student" if config.online_targets else "ema"], batch, history, draws)
        anchored = rows_of_kind(config, batch, step, "real", "coupled", "literal", "forced")
        queries: list[LossQuery] = []
        if len(anchored):
            queries.append(self._flow_matching(batch, anchored, info))  # step 3, rows A
        if config.shortcut_weight:
            queries.append(self._shortcut(teacher, clean, batch, info))  # steps 3 and 4
        velocities = query_velocities(history.student, [query for query, _ in queries]) if queries else []
        terms: list[LossTerm] = []
        for (_, loss), u in zip(queries, velocities, strict=True):
            terms += loss(u)
        if not has_scores:
            return {"student": terms}, []
        part, fake = batch.rows(scored), self._fake_score(models["fake"], teacher, history, batch.cond, rows=scored)
        y, (eps, tau) = self._score_samples(history, draws, scored), self._draw_scores(part, info, 0)
        weight, floor = config.dmd_weight * scale, config.dmd_floor
        real = teacher.rows(scored)
        dmd = dmd_terms(y, real=real, fake=fake(), eps=eps, tau=tau, weight=weight, floor=floor)  # steps 4 and 5
        detached = {m: s.with_latents(s.latents.detach()) for m, s in y.items()}

        def fake_score_terms(index: int) -> list[LossTerm]:
            eps, tau = self._draw_scores(part, info, index)
            return flow_matching_terms(fake(), detached, eps, tau, name="fake_score")

        first = {"student": terms + (dmd.student if scale else []), "fake": dmd.fake}
        return first, [partial(fake_score_terms, index) for index in range(1, config.fake_updates)]

    @torch.no_grad()
    def _teacher(self, model: VelocityModel, batch: AVBatch, history: Histories, draws: StepDraws) -> DenoiserContext:
        """Return the guided multi-step mode on the same history.

        Its trust label is capped at the labels that flow matching trains (1 in the literal reading). Only the few-step
        losses would train larger labels, and their targets come from this velocity.
        """
        guided = DenoiserContext(model=model, cond=batch.cond, guidance=self.config.guidance)
        trained = 1.0 if "literal" in self.config.rows else draws.strength
        label = trust_label(self.config, history.strength.clamp_max(trained))
        return guided.append_history(history_of(history.streams), label)

    def _flow_matching(self, batch: AVBatch, anchored: Tensor, info: StepInfo) -> LossQuery:
        part = batch.rows(anchored)
        eps = draw_noise(part.streams, info.seed, "mutual/flow_matching", part.samples)
        t = draw_noise_levels(self.config.time, part.streams, seed=info.seed, name="mutual/level", samples=part.samples)
        query = VelocityQuery(rows=anchored, x=add_noise(part.streams, eps, t), t=t, r=t)
        return query, lambda u: flow_matching_loss(u, part.streams, eps, t)

    def _shortcut(self, teacher: DenoiserContext, clean: Streams, batch: AVBatch, info: StepInfo) -> LossQuery:
        config = self.config
        is_finest = torch.tensor([config.finest_rows[int(s) % len(config.finest_rows)] for s in batch.samples])
        depth = draw_depth(
            config.finest,
            is_finest,
            seed=info.seed,
            name="mutual/depth",
            samples=batch.samples,
            power=config.depth_power,
        )
        place = uniform_rows(info.seed, "mutual/interval", batch.samples, batch.chunks)
        depth, place = (to_device_of(values, batch.cond.caption) for values in (depth, place))
        at = dyadic_intervals(depth, place, {m: config.time.shift[m] for m in clean})
        eps = draw_noise(clean, info.seed, "mutual/shortcut", batch.samples)
        query = VelocityQuery(rows=torch.arange(len(batch.samples)), x=add_noise(clean, eps, at.t), t=at.t, r=at.r)
        target = shortcut_target(teacher, query.x, at, is_finest, base=config.base)
        return query, lambda u: shortcut_loss(u, target, clean, at, weight=config.shortcut_weight)

    def _fake_score(
        self, model: VelocityModel, teacher: DenoiserContext, history: Histories, cond: Condition, *, rows: Tensor
    ) -> Callable[[], DenoiserContext]:
        """Return a function that evaluates the history by the current weights of the fake score."""
        context = DenoiserContext(model=model, cond=cond.rows(rows))
        if self.config.share_history:
            return lambda: replace(context, cache=teacher.rows(rows).cache)
        clean = history_of({m: s.rows(rows) for m, s in history.streams.items()})
        label = trust_label(self.config, history.strength[rows])
        return lambda: context.append_history(clean, label)

    def _score_samples(self, history: Histories, draws: StepDraws, rows: Tensor) -> dict[str, Stream]:
        samples = history.samples
        assert samples is not None
        index = torch.isin(samples.rows, rows)
        if self.config.jump_exit and samples.exit_state is not None:
            exit_state = {m: s.rows(index) for m, s in samples.exit_state.items()}
            return denoise_in_one_step(history.student.rows(rows).detach(), exit_state, draws.plan, draws.exit_step)
        return {m: s.rows(index) for m, s in samples.streams.items()}

    def _draw_scores(self, part: AVBatch, info: StepInfo, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draw the noise and the levels at which both scores are evaluated."""
        suffix = f"/{index}" if index else ""
        time = replace(self.config.time, uniform_share=1.0)
        eps = draw_noise(part.streams, info.seed, f"mutual/dmd{suffix}", part.samples)
        tau = draw_noise_levels(time, part.streams, seed=info.seed, name=f"mutual/tau{suffix}", samples=part.samples)
        return eps, {m: level.clamp_min(MIN_TAU) for m, level in tau.items()}


def _clean_chunks(real: Streams, history: Streams, free: Tensor) -> dict[str, Stream]:
    """Return the clean chunks (step 2): those of the clip, except in free rows, which use the history."""
    return replace_rows(dict(real), {m: s.rows(free) for m, s in history.items()}, free) if len(free) else dict(real)
