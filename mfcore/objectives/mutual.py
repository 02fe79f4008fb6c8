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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mfcore.flow import TimeConfig, noised
from mfcore.objectives.dmd import DmdTerms, dmd_terms, jump_to_data
from mfcore.objectives.flow_matching import draw_levels, draw_noise, flow_matching_loss
from mfcore.objectives.shortcut import draw_depth, dyadic_intervals, shortcut_loss, shortcut_target
from mfcore.objectives.terms import StepInfo, Term
from mfcore.rng import generator, uniform_rows
from mfcore.rollout import coupled_starts, join_chunks, rollout
from mfcore.steps import Context, Query, Schedule, ask, denoise, finishing_schedule, past, schedule
from mfcore.types import AVBatch, Stream, Streams, VelocityModel

LEAST_TAU = 0.02  # below it both scores see the sample itself, and their difference is network error

RowKind = Literal["real", "coupled", "free", "literal", "forced"]


@dataclass(frozen=True, kw_only=True)
class MutualConfig:
    """One mutual step, and the order in which its parts come in. All lengths are optimizer steps of the stage."""

    time: TimeConfig
    rows: tuple[RowKind, ...] = ("real", "free", "coupled", "free")  # by sample number, cyclic
    finest_rows: tuple[bool, ...] = (True, False, False, True)  # ShortCut at the deepest level, same cycle
    finest: int = 5  # depth of the ShortCut ladder: 2^finest intervals
    strengths: tuple[int, ...] = (3, 4, 5)  # coupled history at s = shift(2^-k), k drawn per step
    rollout_steps: tuple[int, ...] = (4, 8)  # few-step calls per chunk of free history, drawn per step
    guidance: float = 2.0  # built into the few-step mode
    shortcut_weight: float = 2 / 3
    dmd_weight: float = 1 / 3
    dmd_floor: float = 1e-3  # least normaliser of the DMD gradient
    trust_label: bool = True  # label history with its strength
    jump_exit: bool = False  # ablation: leave the roll-out by one call instead of finishing the schedule
    share_history: bool = False  # the fake score reads the teacher's keys and values: sound for a low-rank one only
    real_until: int = 0  # ShortCut on real history only, before this step
    free_from: int = 0  # free history from this step on (before: such rows are coupled)
    fake_from: int = 0  # the fake score learns from this step on
    dmd_from: int = 0  # DMD moves the student from this step on
    dmd_ramp: int = 1  # steps over which its weight rises

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.finest_rows):
            raise ValueError("rows and finest_rows describe the same cycle: give them equal lengths")
        if max(self.strengths) > self.finest:
            raise ValueError(f"history strengths {self.strengths} go beyond the ShortCut depth {self.finest}")
        if any(s & (s - 1) or s > 2**self.finest for s in self.rollout_steps):
            raise ValueError(
                f"rollout_steps {self.rollout_steps}: ShortCut trains powers of two up to {2**self.finest} steps"
            )
        if "forced" in self.rows and {"free", "literal"} & set(self.rows):
            raise ValueError(f"rows {self.rows}: forced ones cut the loop that free and literal ones close, choose one")
        if self.dmd_from < self.fake_from:
            raise ValueError("DMD needs a fake score that has learned: dmd_from must not come before fake_from")

    def kind(self, sample: int, step: int) -> RowKind:
        """What row number ``sample`` is at this step of the stage."""
        kind = self.rows[sample % len(self.rows)]
        if step < self.real_until:
            return "real"
        return "coupled" if kind == "free" and step < self.free_from else kind

    def dmd_scale(self, step: int) -> float:
        """Share of the DMD weight that is in force."""
        return min(1.0, max(0.0, (step + 1 - self.dmd_from) / self.dmd_ramp)) if step >= self.dmd_from else 0.0


@dataclass(frozen=True, kw_only=True)
class _Control:
    """What is drawn once per step, alike on all ranks: it shapes control flow."""

    strength: float  # of coupled history
    finish: Schedule  # the one call that finishes it
    plan: Schedule  # of free history
    exit_step: int  # of ``plan``


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Rows made by the few-step mode, with gradient from the exit step on where DMD moves them."""

    rows: Tensor
    streams: dict[str, Stream]
    stash: dict[str, Stream] | None  # states at the exit step


@dataclass(frozen=True, kw_only=True)
class _Written:
    """Rows with their history H, and the student remembering all but its last chunk."""

    rows: Tensor
    strength: float
    streams: dict[str, Stream]
    student: Context
    samples: _Samples | None = None


@dataclass(frozen=True, kw_only=True)
class _Histories:
    """What step 1 leaves. H is data; the keys and values in ``student`` have a gradient, as in pretraining."""

    streams: dict[str, Stream]
    strength: Tensor  # (B,)
    student: Context
    samples: _Samples | None  # what DMD judges


Asked = tuple[Query, Callable[[dict[str, Tensor]], list[Term]]]
"""What the student is asked, and the loss of its answer."""


class Mutual:
    """The objective of the mutual stage."""

    needs = ("student", "ema", "fake")

    def __init__(self, config: MutualConfig) -> None:
        self.config = config

    def __call__(self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo) -> dict[str, list[Term]]:
        config, step = self.config, info.stage_step
        control, free = self._control(batch.streams, info), self._where(batch, step, "free")
        judged = self._where(batch, step, "free", "forced")
        scored = len(judged) > 0 and step >= config.fake_from and config.dmd_weight > 0
        scale = config.dmd_scale(step) if scored else 0.0
        history = self._histories(models["student"], batch, control, info, scored=scored, moved=scale > 0)  # step 1
        clean = _mix(batch.streams, history.streams, free)  # step 2
        teacher = self._teacher(models["ema"], batch, history, control)
        anchored = self._where(batch, step, "real", "coupled", "literal", "forced")
        asked = [self._flow_matching(batch, anchored, info)] if len(anchored) else []  # step 3, rows A
        asked += [self._shortcut(teacher, clean, batch, info)] if config.shortcut_weight else []  # steps 3 and 4
        answers = ask(history.student, [query for query, _ in asked]) if asked else []
        terms = [term for (_, loss), u in zip(asked, answers, strict=True) for term in loss(u)]
        if not scored:
            return {"student": terms}
        dmd = self._dmd(models["fake"], teacher, history, control, batch, judged, info, scale)  # steps 4 and 5
        return {"student": terms + (dmd.student if scale else []), "fake": dmd.fake}

    def _where(self, batch: AVBatch, step: int, *kinds: RowKind) -> Tensor:
        """Numbers of the rows of these kinds."""
        return torch.tensor([i for i, s in enumerate(batch.samples) if self.config.kind(int(s), step) in kinds]).long()

    def _control(self, streams: Streams, info: StepInfo) -> _Control:
        draw = generator(info.seed, "mutual/control", info.step)
        shift = {m: self.config.time.shift[m] for m in streams}
        strength = 2.0 ** -_choose(self.config.strengths, draw)
        plan = schedule(_choose(self.config.rollout_steps, draw), shift)
        exit_step = int(torch.randint(len(next(iter(plan.values()))) - 1, (), generator=draw))
        return _Control(strength=strength, finish=finishing_schedule(strength, shift), plan=plan, exit_step=exit_step)

    def _histories(
        self, model: VelocityModel, batch: AVBatch, control: _Control, info: StepInfo, *, scored: bool, moved: bool
    ) -> _Histories:
        """Step 1: online weights, few-step mode. What the roll-out wrote to go on is what step 3 reads."""
        student = Context(model=model, cond=batch.cond).opened()
        exit_step = control.exit_step if moved else None
        real, coupled, forced = (self._where(batch, info.stage_step, k) for k in ("real", "coupled", "forced"))
        rolled = self._where(batch, info.stage_step, "free", "literal")
        written: list[_Written] = []
        if len(real):
            written.append(self._given(student, batch, real))
        if len(coupled):
            written.append(self._rolled(student, batch, coupled, control.finish, control.strength, None, info))
        if len(rolled):
            written.append(self._rolled(student, batch, rolled, control.plan, 1.0, exit_step, info))
        if len(forced):
            given = self._given(student, batch, forced)
            written.append(self._forced(given, batch, control.plan, exit_step, info) if scored else given)
        streams, strength = dict(batch.streams), torch.zeros(len(batch.samples), device=batch.cond.caption.device)
        for part in written:
            streams = _put(streams, part.streams, part.rows)
            strength[part.rows] = part.strength
        place = torch.cat([part.rows for part in written]).argsort()
        return _Histories(
            streams=streams,
            strength=strength,
            student=Context.stack([part.student for part in written]).rows(place),
            samples=written[-1].samples,
        )

    def _given(self, student: Context, batch: AVBatch, rows: Tensor) -> _Written:
        """The clip's own chunks."""
        own = dict(batch.rows(rows).streams)
        return _Written(rows=rows, strength=0.0, streams=own, student=student.rows(rows).remember(past(own), None))

    def _rolled(
        self,
        student: Context,
        batch: AVBatch,
        rows: Tensor,
        plan: Schedule,
        strength: float,
        exit_step: int | None,
        info: StepInfo,
    ) -> _Written:
        """Chunk after chunk from the real ones noised to the plan's first level (1: pure noise)."""
        part = batch.rows(rows)
        eps = draw_noise(part.streams, info.seed, "mutual/history", part.samples)
        starts = coupled_starts(part.streams, eps, {m: line[0] for m, line in plan.items()}, part.chunks)
        label = self._label(torch.full((len(rows),), strength, device=part.cond.caption.device))
        made = list(rollout(student.rows(rows), starts, plan, trust=label, exit_step=exit_step, forget=False))
        streams = join_chunks(c.clean for c in made)
        stash = None if exit_step is None else join_chunks(c.stash for c in made if c.stash is not None)
        return _Written(
            rows=rows,
            strength=strength,
            streams=streams,
            student=made[-1].before,
            samples=_Samples(rows=rows, streams=streams, stash=stash),
        )

    def _forced(
        self, given: _Written, batch: AVBatch, plan: Schedule, exit_step: int | None, info: StepInfo
    ) -> _Written:
        """All chunks at once from noise, each after the clip's own chunks: samples that no history is made of."""
        part = batch.rows(given.rows)
        eps = draw_noise(part.streams, info.seed, "mutual/history", part.samples)
        start = {m: s.with_latents(eps[m]) for m, s in part.streams.items()}
        made, stash = denoise(given.student, start, plan, exit_step=exit_step)
        return replace(given, samples=_Samples(rows=given.rows, streams=made, stash=stash))

    @torch.no_grad()
    def _teacher(self, ema: VelocityModel, batch: AVBatch, history: _Histories, control: _Control) -> Context:
        """The guided multi-step mode on the same history. Its label is no more than flow matching trains that mode
        with: only the few-step losses would shape its answer to s = 1, and they take their targets from that answer.
        """
        guided = Context(model=ema, cond=batch.cond, guidance=self.config.guidance)
        return guided.remember(past(history.streams), self._label(history.strength.clamp_max(control.strength)))

    def _label(self, strength: Tensor) -> Tensor | None:
        return strength if self.config.trust_label else None

    def _flow_matching(self, batch: AVBatch, anchored: Tensor, info: StepInfo) -> Asked:
        part = batch.rows(anchored)
        eps = draw_noise(part.streams, info.seed, "mutual/flow_matching", part.samples)
        t = draw_levels(self.config.time, part.streams, info.seed, "mutual/level", part.samples)
        query = Query(rows=anchored, x=noised(part.streams, eps, t), t=t, r=t)
        return query, lambda u: flow_matching_loss(u, part.streams, eps, t)

    def _shortcut(self, teacher: Context, clean: Streams, batch: AVBatch, info: StepInfo) -> Asked:
        config = self.config
        is_finest = torch.tensor([config.finest_rows[int(s) % len(config.finest_rows)] for s in batch.samples])
        depth = draw_depth(config.finest, is_finest, info.seed, "mutual/depth", batch.samples)
        draws = uniform_rows(info.seed, "mutual/interval", batch.samples, batch.chunks)
        device = batch.cond.caption.device
        at = dyadic_intervals(depth.to(device), draws.to(device), {m: config.time.shift[m] for m in clean})
        eps = draw_noise(clean, info.seed, "mutual/shortcut", batch.samples)
        query = Query(rows=torch.arange(len(batch.samples)), x=noised(clean, eps, at.t), t=at.t, r=at.r)
        target = shortcut_target(teacher, query.x, at, is_finest)
        return query, lambda u: shortcut_loss(u, target, clean, at, weight=config.shortcut_weight)

    def _dmd(
        self,
        fake: VelocityModel,
        teacher: Context,
        history: _Histories,
        control: _Control,
        batch: AVBatch,
        judged: Tensor,
        info: StepInfo,
        scale: float,
    ) -> DmdTerms:
        config, part, own = self.config, batch.rows(judged), history.samples
        assert own is not None
        among = torch.isin(own.rows, judged)
        y = {m: s.rows(among) for m, s in own.streams.items()}
        if config.jump_exit and own.stash is not None:
            stash = {m: s.rows(among) for m, s in own.stash.items()}
            y = jump_to_data(history.student.rows(judged).detach(), stash, control.plan, control.exit_step)
        if config.share_history:
            critic = Context(model=fake, cond=part.cond, memory=teacher.rows(judged).memory)
        else:
            seen = past({m: s.rows(judged) for m, s in history.streams.items()})
            critic = Context(model=fake, cond=part.cond).remember(seen, self._label(history.strength[judged]))
        eps = draw_noise(part.streams, info.seed, "mutual/dmd", part.samples)
        tau = draw_levels(replace(config.time, uniform_share=1.0), part.streams, info.seed, "mutual/tau", part.samples)
        tau = {m: level.clamp_min(LEAST_TAU) for m, level in tau.items()}
        return dmd_terms(
            y, teacher.rows(judged), critic, eps, tau, weight=config.dmd_weight * scale, floor=config.dmd_floor
        )


def _choose(values: tuple[int, ...], draw: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=draw))]


def _put(streams: Mapping[str, Stream], part: Streams, rows: Tensor) -> dict[str, Stream]:
    """``streams`` with some rows replaced, as data."""
    out: dict[str, Stream] = {}
    for m, s in streams.items():
        latents = s.latents.clone()
        latents[rows] = part[m].latents.detach().to(latents.dtype)
        out[m] = s.with_latents(latents)
    return out


def _mix(real: Streams, history: Streams, free: Tensor) -> dict[str, Stream]:
    """Step 2: the clip's chunks, except in free rows, where the history itself is the clean chunk."""
    return _put(dict(real), {m: s.rows(free) for m, s in history.items()}, free) if len(free) else dict(real)
