"""Mutual Forcing: the two modes of one network train each other (METHOD 6).

The few-step mode makes the history, so the multi-step mode learns to continue what it will meet; the multi-step mode
teaches the few-step mode. Rows of a batch differ in their history:

========  ==========================================  ==================  ==========================
row       history                                     clean chunk z       terms
========  ==========================================  ==================  ==========================
real      the clip's own chunks (s = 0)               the clip's          flow matching, ShortCut
coupled   the clip noised to s, finished in one call  the clip's          flow matching, ShortCut
free      rolled out from noise (s = 1)               the rolled-out one  ShortCut, DMD
literal   rolled out from noise (s = 1)               the clip's          flow matching, ShortCut
forced    the clip's own chunks (s = 0)               the clip's          all; DMD on single chunks
========  ==========================================  ==================  ==========================

``literal`` is the reading that makes history useless (the trap of METHOD 6), ``forced`` the loop cut; they exist to
show what the others are for (``baselines.py``).
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
from mfcore.types import AVBatch, Stream, Streams, VelocityModel

LEAST_TAU = 0.02  # below it both scores see the sample itself, and their difference is network error

Asked = tuple[VelocityQuery, Callable[[dict[str, Tensor]], list[LossTerm]]]
"""What the student is asked, and the loss of its answer."""


class MutualForcingObjective:
    """The objective of the mutual stage."""

    needs = ("student", "ema", "fake")

    def __init__(self, config: MutualConfig) -> None:
        self.config = config

    def __call__(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> dict[str, list[LossTerm]]:
        return next(self.rounds(models, batch, info))

    def rounds(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> Iterator[dict[str, list[LossTerm]]]:
        """The terms of the step, then ``fake_updates - 1`` times those of the fake score at new noise levels."""
        terms, further = self._step(models, batch, info)
        yield terms  # what the step remembered is free by now, but for what ``further`` needs
        for score in further:
            yield {"fake": score()}

    def _step(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> tuple[dict[str, list[LossTerm]], list[Callable[[], list[LossTerm]]]]:
        config, step = self.config, info.stage_step
        control, free = draw_step(config, batch.streams, info), rows_of_kind(config, batch, step, "free")
        judged = rows_of_kind(config, batch, step, "free", "forced")
        scored = len(judged) > 0 and step >= config.fake_from and config.dmd_weight > 0
        scale = config.dmd_scale(step) if scored else 0.0
        samples = "moved" if scale else "judged" if scored else "unseen"
        history = write_histories(config, models["student"], batch, control, info, samples)  # step 1
        clean = _mix(batch.streams, history.streams, free)  # step 2
        teacher = self._teacher(models["student" if config.online_targets else "ema"], batch, history, control)
        anchored = rows_of_kind(config, batch, step, "real", "coupled", "literal", "forced")
        asked = [self._flow_matching(batch, anchored, info)] if len(anchored) else []  # step 3, rows A
        asked += [self._shortcut(teacher, clean, batch, info)] if config.shortcut_weight else []  # steps 3 and 4
        answers = query_velocities(history.student, [query for query, _ in asked]) if asked else []
        terms = [term for (_, loss), u in zip(asked, answers, strict=True) for term in loss(u)]
        if not scored:
            return {"student": terms}, []
        part, critic = batch.rows(judged), self._critic(models["fake"], teacher, history, batch, judged)
        y, (eps, tau) = self._judged(history, control, judged), self._judging(part, info, 0)
        weight, floor = config.dmd_weight * scale, config.dmd_floor
        dmd = dmd_terms(y, teacher.rows(judged), critic(), eps, tau, weight=weight, floor=floor)  # steps 4 and 5
        still = {m: s.with_latents(s.latents.detach()) for m, s in y.items()}
        further: Callable[[int], list[LossTerm]] = lambda turn: flow_matching_terms(
            critic(), still, *self._judging(part, info, turn), name="fake_score"
        )
        first = {"student": terms + (dmd.student if scale else []), "fake": dmd.fake}
        return first, [partial(further, turn) for turn in range(1, config.fake_updates)]

    @torch.no_grad()
    def _teacher(self, model: VelocityModel, batch: AVBatch, history: Histories, control: StepDraws) -> DenoiserContext:
        """The guided multi-step mode on the same history. Its label is no more than flow matching trains that mode
        with (1 in the literal reading): only the few-step losses would shape its answer to a greater one, and they take
        their targets from that answer.
        """
        guided = DenoiserContext(model=model, cond=batch.cond, guidance=self.config.guidance)
        trained = 1.0 if "literal" in self.config.rows else control.strength
        label = trust_label(self.config, history.strength.clamp_max(trained))
        return guided.append_history(history_of(history.streams), label)

    def _flow_matching(self, batch: AVBatch, anchored: Tensor, info: StepInfo) -> Asked:
        part = batch.rows(anchored)
        eps = draw_noise(part.streams, info.seed, "mutual/flow_matching", part.samples)
        t = draw_noise_levels(self.config.time, part.streams, info.seed, "mutual/level", part.samples)
        query = VelocityQuery(rows=anchored, x=add_noise(part.streams, eps, t), t=t, r=t)
        return query, lambda u: flow_matching_loss(u, part.streams, eps, t)

    def _shortcut(self, teacher: DenoiserContext, clean: Streams, batch: AVBatch, info: StepInfo) -> Asked:
        config = self.config
        is_finest = torch.tensor([config.finest_rows[int(s) % len(config.finest_rows)] for s in batch.samples])
        power = config.depth_power
        depth = draw_depth(config.finest, is_finest, info.seed, "mutual/depth", batch.samples, power)
        draws = uniform_rows(info.seed, "mutual/interval", batch.samples, batch.chunks)
        depth, draws = (to_device_of(some, batch.cond.caption) for some in (depth, draws))
        at = dyadic_intervals(depth, draws, {m: config.time.shift[m] for m in clean})
        eps = draw_noise(clean, info.seed, "mutual/shortcut", batch.samples)
        query = VelocityQuery(rows=torch.arange(len(batch.samples)), x=add_noise(clean, eps, at.t), t=at.t, r=at.r)
        target = shortcut_target(teacher, query.x, at, is_finest, config.base)
        return query, lambda u: shortcut_loss(u, target, clean, at, weight=config.shortcut_weight)

    def _critic(
        self, fake: VelocityModel, teacher: DenoiserContext, history: Histories, batch: AVBatch, judged: Tensor
    ) -> Callable[[], DenoiserContext]:
        """The fake score after the same history, which it reads anew after each of its updates."""
        context = DenoiserContext(model=fake, cond=batch.cond.rows(judged))
        if self.config.share_history:
            return lambda: replace(context, memory=teacher.rows(judged).memory)
        seen = history_of({m: s.rows(judged) for m, s in history.streams.items()})
        label = trust_label(self.config, history.strength[judged])
        return lambda: context.append_history(seen, label)

    def _judged(self, history: Histories, control: StepDraws, judged: Tensor) -> dict[str, Stream]:
        own = history.samples
        assert own is not None
        among = torch.isin(own.rows, judged)
        if self.config.jump_exit and own.stash is not None:
            stash = {m: s.rows(among) for m, s in own.stash.items()}
            return denoise_in_one_step(history.student.rows(judged).detach(), stash, control.plan, control.exit_step)
        return {m: s.rows(among) for m, s in own.streams.items()}

    def _judging(self, part: AVBatch, info: StepInfo, turn: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Noise and levels at which both scores look at the samples."""
        again = f"/{turn}" if turn else ""
        time = replace(self.config.time, uniform_share=1.0)
        eps = draw_noise(part.streams, info.seed, f"mutual/dmd{again}", part.samples)
        tau = draw_noise_levels(time, part.streams, info.seed, f"mutual/tau{again}", part.samples)
        return eps, {m: level.clamp_min(LEAST_TAU) for m, level in tau.items()}


def _mix(real: Streams, history: Streams, free: Tensor) -> dict[str, Stream]:
    """Step 2: the clip's chunks, except in free rows, where the history itself is the clean chunk."""
    return replace_rows(dict(real), {m: s.rows(free) for m, s in history.items()}, free) if len(free) else dict(real)
