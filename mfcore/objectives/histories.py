"""Step 1 of the mutual step (METHOD 6): the history of every row, and the samples for DMD."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mfcore.objectives.flow_matching import draw_noise
from mfcore.objectives.losses import StepInfo
from mfcore.objectives.mutual_config import MutualConfig, RowKind
from mfcore.rng import generator
from mfcore.rollout import coupled_starts, join_chunks, rollout, step_noise
from mfcore.solver import (
    DenoiserContext,
    Renoising,
    SamplerName,
    Schedule,
    denoise,
    history_of,
    sampler_renoising,
    sampler_schedule,
    single_step_schedule,
)
from mfcore.types import AVBatch, Stream, Streams, VelocityModel

SampleUse = Literal["unused", "scored", "distilled"]
"""Use of the samples: none, training of the fake score, or DMD with gradient."""


@dataclass(frozen=True, kw_only=True)
class StepDraws:
    """Draws of one step, equal on all ranks because they shape control flow."""

    strength: float  # of coupled history
    finish: Schedule  # single call that finishes coupled history
    plan: Schedule  # of free history
    exit_step: int  # of ``plan``
    sampler: SamplerName  # of ``plan``


@dataclass(frozen=True, kw_only=True)
class RolloutSamples:
    """Samples of the few-step mode, with gradient from the exit step on if DMD uses them."""

    rows: Tensor
    streams: dict[str, Stream]
    exit_state: dict[str, Stream] | None  # states at the exit step


@dataclass(frozen=True, kw_only=True)
class _RowHistories:
    """Rows with their history H, and the student context with all chunks but the last in its cache."""

    rows: Tensor
    strength: float
    streams: dict[str, Stream]
    student: DenoiserContext
    samples: RolloutSamples | None = None


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Result of step 1. H is data; the keys and values in ``student`` have a gradient, as in pretraining."""

    streams: dict[str, Stream]
    strength: Tensor  # (B,)
    student: DenoiserContext
    samples: RolloutSamples | None  # samples for DMD


def rows_of_kind(config: MutualConfig, batch: AVBatch, step: int, *kinds: RowKind) -> Tensor:
    """Return the indices of the rows of these kinds at ``step`` of the stage."""
    return torch.tensor([i for i, s in enumerate(batch.samples) if config.row_kind(int(s), step) in kinds]).long()


def trust_label(config: MutualConfig, strength: Tensor) -> Tensor | None:
    """Return the trust label of history of this strength; None if the model has no labels."""
    return strength if config.trust_label else None


def draw_step(config: MutualConfig, streams: Streams, info: StepInfo) -> StepDraws:
    """Draw strength, schedules and exit step of one step, from (seed, step)."""
    draw = generator(info.seed, "mutual/control", info.step)
    shift = {m: config.time.shift[m] for m in streams}
    strength = 2.0 ** -_draw_choice(config.strengths, draw)
    steps = _draw_choice(config.rollout_steps, draw)
    return StepDraws(
        strength=strength,
        finish=single_step_schedule(strength, shift),
        plan=sampler_schedule(config.rollout_sampler, steps, shift),
        exit_step=int(torch.randint(steps, (), generator=draw)),
        sampler=config.rollout_sampler,
    )


def write_histories(
    config: MutualConfig,
    model: VelocityModel,
    batch: AVBatch,
    *,
    draws: StepDraws,
    info: StepInfo,
    samples: SampleUse,
) -> Histories:
    """Return the histories of all rows, by the few-step mode of the online weights (step 1).

    Step 3 reads the keys and values that the rollout wrote. ``samples`` is the use of the samples of this step.
    """
    student = DenoiserContext(model=model, cond=batch.cond).prefill()
    # With ``jump_exit``, the fake score learns the samples that DMD will move.
    keep_exit_state = samples == "distilled" or (samples == "scored" and config.jump_exit)
    exit_step = draws.exit_step if keep_exit_state else None
    rows_of = partial(rows_of_kind, config, batch, info.stage_step)
    roll_out = partial(_roll_out, config, student, batch, info=info)
    parts: list[_RowHistories] = []
    if len(rows := rows_of("real")):
        parts.append(_append_clip(student, batch, rows))
    if len(rows := rows_of("coupled")):
        parts.append(
            roll_out(rows, plan=draws.finish, strength=draws.strength, exit_step=None, sampler="deterministic")
        )
    if len(rows := rows_of("free", "literal")):
        parts.append(roll_out(rows, plan=draws.plan, strength=1.0, exit_step=exit_step, sampler=draws.sampler))
    if len(rows := rows_of("forced")):
        part = _append_clip(student, batch, rows)
        if samples != "unused":
            part = _denoise_all_chunks(part, batch, draws=draws, exit_step=exit_step, info=info)
        parts.append(part)
    streams, strength = dict(batch.streams), torch.zeros(len(batch.samples), device=batch.cond.caption.device)
    for part in parts:
        streams = replace_rows(streams, part.streams, part.rows)
        strength[part.rows] = part.strength
    order = torch.cat([part.rows for part in parts]).argsort()
    return Histories(
        streams=streams,
        strength=strength,
        student=DenoiserContext.stack([part.student for part in parts]).rows(order),
        samples=parts[-1].samples,
    )


def _append_clip(student: DenoiserContext, batch: AVBatch, rows: Tensor) -> _RowHistories:
    """Return the chunks of the clip as history."""
    streams = dict(batch.rows(rows).streams)
    return _RowHistories(
        rows=rows, strength=0.0, streams=streams, student=student.rows(rows).append_history(history_of(streams), None)
    )


def _roll_out(
    config: MutualConfig,
    student: DenoiserContext,
    batch: AVBatch,
    rows: Tensor,
    *,
    plan: Schedule,
    strength: float,
    exit_step: int | None,
    sampler: SamplerName,
    info: StepInfo,
) -> _RowHistories:
    """Roll out from the real chunks noised to the first level of ``plan`` (1: pure noise)."""
    part = batch.rows(rows)
    eps = draw_noise(part.streams, info.seed, "mutual/history", part.samples)
    starts = coupled_starts(part.streams, eps, {m: line[0] for m, line in plan.items()}, part.chunks)
    label = trust_label(config, torch.full((len(rows),), strength, device=part.cond.caption.device))
    renoising = _renoising(sampler, plan, part, info)
    chunks = list(
        rollout(student.rows(rows), starts, plan, trust=label, exit_step=exit_step, evict=False, renoising=renoising)
    )
    streams = join_chunks(c.clean for c in chunks)
    exit_state = None if exit_step is None else join_chunks(c.exit_state for c in chunks if c.exit_state is not None)
    return _RowHistories(
        rows=rows,
        strength=strength,
        streams=streams,
        student=chunks[-1].before,
        samples=RolloutSamples(rows=rows, streams=streams, exit_state=exit_state),
    )


def _denoise_all_chunks(
    history: _RowHistories, batch: AVBatch, *, draws: StepDraws, exit_step: int | None, info: StepInfo
) -> _RowHistories:
    """Sample all chunks in parallel from noise, each after the chunks of the clip; no history uses them."""
    part = batch.rows(history.rows)
    eps = draw_noise(part.streams, info.seed, "mutual/history", part.samples)
    start = {m: s.with_latents(eps[m]) for m, s in part.streams.items()}
    renoising = _renoising(draws.sampler, draws.plan, part, info)
    streams, exit_state = denoise(history.student, start, draws.plan, exit_step=exit_step, renoising=renoising)
    return replace(history, samples=RolloutSamples(rows=history.rows, streams=streams, exit_state=exit_state))


def _renoising(sampler: SamplerName, plan: Schedule, part: AVBatch, info: StepInfo) -> Renoising | None:
    steps = len(next(iter(plan.values()))) - 1
    return sampler_renoising(sampler, steps, step_noise(info.seed, part.samples))


def _draw_choice(values: tuple[int, ...], draw: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=draw))]


def replace_rows(streams: Mapping[str, Stream], part: Streams, rows: Tensor) -> dict[str, Stream]:
    """Return ``streams`` with some rows replaced by detached ones."""
    out: dict[str, Stream] = {}
    for m, s in streams.items():
        latents = s.latents.clone()
        latents[rows] = part[m].latents.detach().to(latents.dtype)
        out[m] = s.with_latents(latents)
    return out
