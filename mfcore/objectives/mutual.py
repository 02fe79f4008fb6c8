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
========  ==========================================  ==================  ==========================

``literal`` is the reading that makes history useless (the trap of METHOD 6); it exists to show so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mfcore.flow import TimeConfig
from mfcore.objectives.dmd import DmdTerms, dmd_terms, finish
from mfcore.objectives.flow_matching import draw_levels, draw_noise, flow_matching_terms
from mfcore.objectives.shortcut import draw_depth, dyadic_intervals, shortcut_terms
from mfcore.objectives.terms import StepInfo, Term
from mfcore.rng import generator, uniform_rows
from mfcore.rollout import coupled_starts, join_chunks, rollout
from mfcore.steps import Context, Schedule, finishing_schedule, schedule
from mfcore.types import AVBatch, Stream, Streams, VelocityModel

LEAST_TAU = 0.02  # below it both scores see the sample itself, and their difference is network error

RowKind = Literal["real", "coupled", "free", "literal"]


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
class _Rows:
    """Row numbers by what they do."""

    coupled: Tensor
    rolled: Tensor  # free or literal
    anchored: Tensor  # clean chunk from the clip: flow matching
    free: Tensor


@dataclass(frozen=True, kw_only=True)
class _Histories:
    """History of every row, its strength, and the stashed states of the rolled-out rows."""

    streams: dict[str, Stream]
    strength: Tensor  # (B,)
    coupled_strength: float  # of this step
    stash: dict[str, Stream] | None
    plan: Schedule
    exit_step: int

    @property
    def teacher_label(self) -> Tensor:
        """Labels for the multi-step mode as teacher: no more than flow matching has trained it with.

        Only the few-step losses would shape its answer to s = 1, and they take their targets from that answer.
        """
        return self.strength.clamp_max(self.coupled_strength)


class Mutual:
    """The objective of the mutual stage."""

    needs = ("student", "ema", "fake")

    def __init__(self, config: MutualConfig) -> None:
        self.config = config

    def __call__(self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo) -> dict[str, list[Term]]:
        config, step = self.config, info.stage_step
        rows = self._rows(batch, step)
        history = self._histories(models["student"], batch, rows, info)  # step 1
        clean = _mix(batch.streams, history.streams, rows.free)  # step 2
        trust = history.strength if config.trust_label else None
        student = Context(model=models["student"], cond=batch.cond).remember(history.streams, trust)
        with torch.no_grad():
            guided = Context(model=models["ema"], cond=batch.cond, guidance=config.guidance)
            teacher = guided.remember(history.streams, history.teacher_label if config.trust_label else None)
        terms = self._flow_matching(student, batch, rows.anchored, info)  # step 3, rows A
        terms += self._shortcut(student, teacher, clean, batch, info)  # steps 3 and 4
        if not len(rows.free) or step < config.fake_from or not config.dmd_weight:
            return {"student": terms}
        dmd = self._dmd(models["fake"], student, teacher, history, trust, batch, rows, info)  # steps 3 to 5
        return {"student": terms + (dmd.student if config.dmd_scale(step) else []), "fake": dmd.fake}

    def _rows(self, batch: AVBatch, step: int) -> _Rows:
        kinds = [self.config.kind(int(s), step) for s in batch.samples]

        def where(*wanted: RowKind) -> Tensor:
            return torch.tensor([i for i, kind in enumerate(kinds) if kind in wanted], dtype=torch.long)

        return _Rows(
            coupled=where("coupled"),
            rolled=where("free", "literal"),
            anchored=where("real", "coupled", "literal"),
            free=where("free"),
        )

    @torch.no_grad()
    def _histories(self, student: VelocityModel, batch: AVBatch, rows: _Rows, info: StepInfo) -> _Histories:
        """Step 1: online weights, few-step mode. Draws that shape control flow depend on the step alone."""
        draw = generator(info.seed, "mutual/control", info.step)
        shift = {m: self.config.time.shift[m] for m in batch.streams}
        k = _choose(self.config.strengths, draw)
        plan = schedule(_choose(self.config.rollout_steps, draw), shift)
        exit_step = int(torch.randint(len(next(iter(plan.values()))) - 1, (), generator=draw))
        streams, stash = dict(batch.streams), None
        strength = torch.zeros(len(batch.samples), device=batch.cond.caption.device)
        if len(rows.coupled):
            finished, _ = self._rolled(
                student, batch.rows(rows.coupled), finishing_schedule(2.0**-k, shift), None, info, 2.0**-k
            )
            streams = _put(streams, finished, rows.coupled)
            strength[rows.coupled] = 2.0**-k
        if len(rows.rolled):
            rolled, stash = self._rolled(student, batch.rows(rows.rolled), plan, exit_step, info, 1.0)
            streams = _put(streams, rolled, rows.rolled)
            strength[rows.rolled] = 1.0
        return _Histories(
            streams=streams, strength=strength, coupled_strength=2.0**-k, stash=stash, plan=plan, exit_step=exit_step
        )

    def _rolled(
        self,
        student: VelocityModel,
        part: AVBatch,
        plan: Schedule,
        exit_step: int | None,
        info: StepInfo,
        strength: float,
    ) -> tuple[dict[str, Stream], dict[str, Stream] | None]:
        """Chunk after chunk from the real ones noised to the plan's first level (1: pure noise)."""
        eps = draw_noise(part.streams, info.seed, "mutual/history", part.samples)
        starts = coupled_starts(part.streams, eps, {m: line[0] for m, line in plan.items()}, part.chunks)
        label = torch.full((len(part.samples),), strength) if self.config.trust_label else None
        label = label if label is None else label.to(part.cond.caption.device)
        chunks = list(rollout(Context(model=student, cond=part.cond), starts, plan, trust=label, exit_step=exit_step))
        stash = None if exit_step is None else join_chunks(c.stash for c in chunks if c.stash is not None)
        return join_chunks(c.clean for c in chunks), stash

    def _flow_matching(self, student: Context, batch: AVBatch, anchored: Tensor, info: StepInfo) -> list[Term]:
        if not len(anchored):
            return []
        part = batch.rows(anchored)
        eps = draw_noise(part.streams, info.seed, "mutual/flow_matching", part.samples)
        t = draw_levels(self.config.time, part.streams, info.seed, "mutual/level", part.samples)
        return flow_matching_terms(student.rows(anchored), part.streams, eps, t)

    def _shortcut(
        self, student: Context, teacher: Context, clean: Streams, batch: AVBatch, info: StepInfo
    ) -> list[Term]:
        config = self.config
        if not config.shortcut_weight:
            return []
        is_finest = torch.tensor([config.finest_rows[int(s) % len(config.finest_rows)] for s in batch.samples])
        depth = draw_depth(config.finest, is_finest, info.seed, "mutual/depth", batch.samples)
        draws = uniform_rows(info.seed, "mutual/interval", batch.samples, batch.chunks)
        device = batch.cond.caption.device
        at = dyadic_intervals(depth.to(device), draws.to(device), {m: config.time.shift[m] for m in clean})
        eps = draw_noise(clean, info.seed, "mutual/shortcut", batch.samples)
        return shortcut_terms(student, teacher, clean, eps, at, is_finest, weight=config.shortcut_weight)

    def _dmd(
        self,
        fake: VelocityModel,
        student: Context,
        teacher: Context,
        history: _Histories,
        trust: Tensor | None,
        batch: AVBatch,
        rows: _Rows,
        info: StepInfo,
    ) -> DmdTerms:
        config, free, part = self.config, rows.free, batch.rows(rows.free)
        assert history.stash is not None
        among = torch.isin(rows.rolled, free)
        stash = {m: s.rows(among) for m, s in history.stash.items()}
        scale = config.dmd_scale(info.stage_step)
        with torch.set_grad_enabled(scale > 0):
            y = finish(student.rows(free).detach(), stash, history.plan, history.exit_step, jump=config.jump_exit)
        past = {m: s.rows(free) for m, s in history.streams.items()}
        critic = Context(model=fake, cond=part.cond).remember(past, trust if trust is None else trust[free])
        eps = draw_noise(part.streams, info.seed, "mutual/dmd", part.samples)
        tau = draw_levels(replace(config.time, uniform_share=1.0), part.streams, info.seed, "mutual/tau", part.samples)
        tau = {m: level.clamp_min(LEAST_TAU) for m, level in tau.items()}
        return dmd_terms(
            y, teacher.rows(free), critic, eps, tau, weight=config.dmd_weight * scale, floor=config.dmd_floor
        )


def _choose(values: tuple[int, ...], draw: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=draw))]


def _put(streams: Mapping[str, Stream], part: Streams, rows: Tensor) -> dict[str, Stream]:
    """``streams`` with some rows replaced."""
    out: dict[str, Stream] = {}
    for m, s in streams.items():
        latents = s.latents.clone()
        latents[rows] = part[m].latents.to(latents.dtype)
        out[m] = s.with_latents(latents)
    return out


def _mix(real: Streams, history: Streams, free: Tensor) -> dict[str, Stream]:
    """Step 2: the clip's chunks, except in free rows, where the history itself is the clean chunk."""
    return _put(dict(real), {m: s.rows(free) for m, s in history.items()}, free) if len(free) else dict(real)
