"""The training loop. It knows engines, objective, tracker and batches by what they do, and no stage by name."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mfcore.ema import Ema
from mfcore.objectives.losses import LossTerm, Objective, StepInfo, summarize_terms, total_loss
from mfcore.optim import OptimConfig, learning_rate
from mfcore.rng import PADDING_SAMPLE
from mfcore.types import AVBatch, VelocityModel
from workflows.config.run import RunConfig
from workflows.tracking.tracker import STEP_KEY, Tracker
from workflows.training.engines.base import Engine, NonFiniteError
from workflows.training.metrics import ThroughputMeter, progress_event
from workflows.training.progress import Progress
from workflows.utils import distributed

_LOGGER = logging.getLogger(__name__)
STUDENT = "student"  # the network that is trained; others are there for its sake

Models = Mapping[str, VelocityModel]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, and how often."""

    name: str  # of the stage, for messages
    seed: int
    steps: int  # optimizer steps of the stage
    batch: int  # samples per step, over all ranks
    log_every: int  # steps
    eval_every: int  # steps
    save_every: int  # samples
    sequence: int = 1  # ranks that have the same clips
    skip_nonfinite: int = 0  # steps that may be left out because a loss or gradient is not finite


class CheckpointSaver(Protocol):
    """Writes checkpoints while training goes on. Every method is called by all ranks together."""

    def save(self, progress: Progress) -> object: ...

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the checkpoint being written cannot be."""
        ...

    def wait(self) -> None:
        """Until everything is written; raises what went wrong."""
        ...


class TrainingInterrupted(RuntimeError):
    """The run was told to end early; a checkpoint of its last step is written. Raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class LoopCallbacks:
    """What a run has around it besides its numbers."""

    stop_reason: Callable[[], str]  # why this rank is to stop, "" while it is not
    heartbeat: Callable[[int, str], object]  # told of the step and of what this rank is about to do in it
    clip_ids: Callable[[Tensor], list[str]]  # clip ids of sample numbers
    # a look at a step's end, by all ranks, given what will be logged: makes samples when they are due, adds numbers
    on_step_end: Callable[[Progress, Mapping[str, float]], dict[str, float]] = lambda progress, log: {}
    # a context in which the networks note, by name, where numbers first are not finite
    record_non_finite: Callable[[], AbstractContextManager[Mapping[str, str]]] = lambda: nullcontext({})


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """One round of a micro-batch."""

    micro: AVBatch
    terms: dict[str, list[LossTerm]]  # without gradient, by the network they train
    rest: Iterator[dict[str, list[LossTerm]]]  # further rounds


def run_loop(
    config: LoopConfig,
    start: Progress,
    *,
    engines: Mapping[str, Engine],
    optims: Mapping[str, OptimConfig],
    ema: Ema,
    objective: Objective,
    batches: Iterable[list[AVBatch]],
    evaluate: Callable[[Models], dict[str, float]],
    count_tokens: Callable[[AVBatch], int],
    tracker: Tracker,
    saver: CheckpointSaver,
    around: LoopCallbacks,
) -> Progress:
    """Train from ``start`` to the end of the stage; returns the final progress, which is saved.

    ``batches``: this rank's micro-batches of every step from ``start.step`` on. NonFiniteError, Stopped and the
    saver's own error are raised on all ranks together, between two steps.
    """
    run = _Run(
        config=config,
        engines=engines,
        optims=optims,
        ema=ema,
        objective=objective,
        models={"ema": ema.model} | {name: e.module for name, e in engines.items()},
        evaluate=evaluate,
        count_tokens=count_tokens,
        tracker=tracker,
        saver=saver,
        around=around,
        meter=ThroughputMeter(),
    )
    progress = run.begin(start) if start.step == 0 else start
    for micros in batches:
        run.meter.batch_ready()
        passes = run.compute(micros, progress.step)
        bad, noticed = run.agree(passes, progress.step)
        bad, log = run.update(progress, passes, bad=bad)
        progress = run.count(progress, bad=bad)
        progress = run.report(progress, [] if bad else passes, log)
        run.save(progress, noticed=noticed)
        around.heartbeat(progress.step, "fetching the batch of")
        run.meter.step_end()
    saver.wait()
    return progress


def count_tokens(config: RunConfig, batch: AVBatch) -> int:
    """Tokens that the network attends with, head and history not counted."""
    return sum(
        s.latents.shape[0] * s.latents.shape[1] * config.model.branches[m].tokens for m, s in batch.streams.items()
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of one step, in the order in which the loop takes them."""

    config: LoopConfig
    engines: Mapping[str, Engine]
    optims: Mapping[str, OptimConfig]
    ema: Ema
    objective: Objective
    models: Models
    evaluate: Callable[[Models], dict[str, float]]
    count_tokens: Callable[[AVBatch], int]
    tracker: Tracker
    saver: CheckpointSaver
    around: LoopCallbacks
    meter: ThroughputMeter

    def begin(self, start: Progress) -> Progress:
        """Judge the untrained network."""
        first = self.evaluate(self.models)
        progress = replace(start, first=first, last=first)
        self.tracker.log(0, {STEP_KEY: 0, **prefix_held_out(first)})
        _LOGGER.info(progress_event(self.config.name, self.config.steps, progress, {}))
        return progress

    def compute(self, micros: Sequence[AVBatch], step: int) -> list[MicroBatchResult]:
        """Losses and gradients."""
        self.around.heartbeat(step, "computing")
        info = StepInfo(seed=self.config.seed, step=step, stage_step=step)
        passes = [self.backward(micro, self.objective.rounds(self.models, micro, info)) for micro in micros]
        samples, tokens = sum(len(m.samples) for m in micros), sum(self.count_tokens(m) for m in micros)
        self.meter.count(samples / self.config.sequence, tokens / self.config.sequence)
        return [p for p in passes if p]

    def backward(self, micro: AVBatch, rounds: Iterator[dict[str, list[LossTerm]]]) -> MicroBatchResult | None:
        """The next round of a micro-batch, if there is one: its losses and gradients.

        Engines average gradients over the ranks, whose shares may differ: a micro-batch counts by its part of the
        global batch, as if the ranks had equal ones. (Where rows differ in kind, each micro-batch holds them in equal
        parts.) Ranks that have the same clips count as one: the mean over them is the gradient of a whole clip.
        """
        shares = distributed.get_world_size() // self.config.sequence
        if (terms := next(rounds, None)) is None:
            return None
        for name, own in terms.items():
            self.engines[name].backward(total_loss(own) * (len(micro.samples) * shares / self.config.batch))
        seen = {name: [replace(t, values=t.values.detach()) for t in own] for name, own in terms.items()}
        return MicroBatchResult(micro=micro, terms=seen, rest=rounds)

    def agree(self, passes: Sequence[MicroBatchResult], step: int) -> tuple[bool, bool]:
        """On all ranks: whether a number of the step is not finite, and whether a rank was told to stop."""
        self.around.heartbeat(step, "waiting for the others")
        bad, noticed, unsaved = sync_flags(passes, self.engines, self.around.stop_reason(), self.saver.has_failed)
        self.around.heartbeat(step, "updating")
        if unsaved:
            self.saver.wait()  # raises
        return bad, noticed

    def update(
        self, progress: Progress, first: Sequence[MicroBatchResult], *, bad: bool
    ) -> tuple[bool, dict[str, float]]:
        """Move the weights, or leave the step out: whether it was; rates and gradient norms for the log.

        The fake score moves first, and once more with every further round; the student moves once, its average last.
        """
        passes, log = first, dict[str, float]()
        while not bad:
            log |= self.move(progress.step, [name for name in passes[0].terms if name != STUDENT])
            again = [p for p in (self.backward(own.micro, own.rest) for own in passes) if p]
            if not again:
                log |= self.move(progress.step, [STUDENT])
                self.ema.update(self.engines[STUDENT].weights(), progress.step)
                return False, log
            passes, (bad, _) = again, self.agree(again, progress.step)
        engines = {n: self.engines[n] for n in first[0].terms}
        skip_step(self.config, progress, passes, engines, self.around, self.where(first, progress.step))
        return True, {}

    @torch.no_grad()
    def where(self, passes: Sequence[MicroBatchResult], step: int) -> list[str]:
        """Blocks and chunks at which numbers of this rank's step first are not finite: its forward passes again."""
        info = StepInfo(seed=self.config.seed, step=step, stage_step=step)
        with self.around.record_non_finite() as noted:
            for own in passes:
                next(self.objective.rounds(self.models, own.micro, info), None)
        return [f"{name}: {text}" for name, text in noted.items()]

    def move(self, step: int, names: Sequence[str]) -> dict[str, float]:
        """One optimizer step of each of these networks."""
        rates = {name: learning_rate(self.optims[name], step, self.config.steps) for name in names}
        norms = {name: self.engines[name].step(rate) for name, rate in rates.items()}
        return {f"grad_norm/{n}": v for n, v in norms.items()} | {f"lr/{n}": v for n, v in rates.items()}

    def count(self, progress: Progress, *, bad: bool) -> Progress:
        """One step more."""
        done = progress.step + 1
        return replace(progress, step=done, samples_seen=done * self.config.batch, skipped=progress.skipped + int(bad))

    def report(self, progress: Progress, passes: Sequence[MicroBatchResult], rates: Mapping[str, float]) -> Progress:
        """Log, evaluate and look at samples where they are due."""
        config, done = self.config, progress.step
        last, log = done == config.steps, dict[str, float]()
        if done % config.log_every == 0 or last:
            seen = gather_terms(term for p in passes for own in p.terms.values() for term in own)
            log = summarize_terms(seen) | dict(rates) | self.meter.collect((config.steps - done) * config.batch)
        if done % config.eval_every == 0 or last:
            with self.meter.exclude():
                progress = replace(progress, last=self.evaluate(self.models))
            log |= prefix_held_out(progress.last)
        if log:
            _LOGGER.info(progress_event(config.name, config.steps, progress, log))
        with self.meter.exclude():
            log |= self.around.on_step_end(progress, log)
        if log:
            self.tracker.log(done, {STEP_KEY: progress.samples_seen, **log})
        return progress

    def save(self, progress: Progress, *, noticed: bool) -> None:
        """A checkpoint where one is due; ends the run on a notice."""
        config, last = self.config, progress.step == self.config.steps
        if last or noticed or crosses_interval(progress.samples_seen, config.batch, config.save_every):
            with self.meter.saving():
                self.saver.save(progress)
        if noticed and not last:
            save_and_stop(config, progress, self.saver, self.around)


def sync_flags(
    passes: Sequence[MicroBatchResult], engines: Mapping[str, Engine], notice: str, failed: bool
) -> list[bool]:
    """What any rank knows, on all ranks: a loss or gradient that is not finite, a notice, a checkpoint that failed."""
    losses = [t.values for p in passes for own in p.terms.values() for t in own if t.values.numel()]
    bad = torch.stack([~torch.isfinite(values).all() for values in losses]).any()
    for engine in engines.values():
        bad = bad | engine.has_non_finite_gradient
    rest = torch.tensor([bool(notice), failed], device=bad.device)
    return distributed.all_reduce_any(torch.cat([bad[None], rest]))


def skip_step(
    config: LoopConfig,
    progress: Progress,
    passes: Sequence[MicroBatchResult],
    engines: Mapping[str, Engine],
    around: LoopCallbacks,
    where: list[str],
) -> None:
    """Forget the gradients of a step that is not finite; NonFiniteError when no more may be left out."""
    mine = [describe_non_finite(p, around.clip_ids) for p in passes if not _finite(p.terms)]
    if not mine and (
        names := [f"the gradient of {name}" for name, e in engines.items() if bool(e.has_non_finite_gradient)]
    ):
        clips = [clip for p in passes for clip in around.clip_ids(p.micro.samples)]
        mine = [f"{', '.join(names)} on clips {', '.join(clips)}"]
    mine += where
    found = "; ".join(
        f"rank {r}: {text}" for r, texts in enumerate(distributed.all_gather_object(mine)) for text in texts
    )
    text = f"stage {config.name}, step {progress.step}: not finite: {found}"
    if progress.skipped >= config.skip_nonfinite:
        raise NonFiniteError(
            f"{text}. No weight was moved by it; {progress.skipped} such steps were left out before. Lower optim.lr, "
            "raise optim.warm_up, look at those clips, or allow some with --set skip_nonfinite=N; then run the same "
            "command to go on from the last checkpoint"
        )
    _LOGGER.warning(f"{text}. Step left out ({progress.skipped + 1} of {config.skip_nonfinite})")
    for engine in engines.values():
        engine.discard_gradients()


def describe_non_finite(found: MicroBatchResult, name_clips: Callable[[Tensor], list[str]]) -> str:
    """The losses that are not finite and the clips of their micro-batch."""
    keys = [t.key for own in found.terms.values() for t in own if not torch.isfinite(t.values).all()]
    samples = found.micro.samples
    clips = ", ".join(name_clips(samples))
    return f"the loss {', '.join(keys)} on clips {clips} (samples {int(samples[0])}..{int(samples[-1])})"


def _finite(terms: Mapping[str, list[LossTerm]]) -> bool:
    return all(bool(torch.isfinite(t.values).all()) for own in terms.values() for t in own)


def save_and_stop(config: LoopConfig, progress: Progress, saver: CheckpointSaver, around: LoopCallbacks) -> None:
    """End between two steps, on a notice."""
    saver.wait()
    reasons = [
        f"rank {rank}: {text}" for rank, text in enumerate(distributed.all_gather_object(around.stop_reason())) if text
    ]
    raise TrainingInterrupted(
        f"stage {config.name} stopped after step {progress.step} of {config.steps} ({'; '.join(reasons)}); "
        "its checkpoint is written: run the same command to go on"
    )


def crosses_interval(samples: int, batch: int, every: int) -> bool:
    """Whether the latest step passed a multiple of ``every`` samples."""
    return samples // every > (samples - batch) // every


def prefix_held_out(terms: Mapping[str, float]) -> dict[str, float]:
    return {f"held_out/{key}": value for key, value in terms.items()}


def gather_terms(terms: Iterable[LossTerm]) -> list[LossTerm]:
    """One term per name and modality with the rows of all micro-batches and ranks: what a log is computed from."""
    own = [replace(t, values=t.values.detach().cpu(), level=None if t.level is None else t.level.cpu()) for t in terms]
    groups: dict[str, list[LossTerm]] = {}
    for term in (term for part in distributed.all_gather_object(own) for term in part):
        groups.setdefault(term.key, []).append(term)
    out: list[LossTerm] = []
    for parts in groups.values():
        levels = [p.level for p in parts if p.level is not None]
        level = torch.cat(levels) if len(levels) == len(parts) else None
        out.append(replace(parts[0], values=torch.cat([p.values for p in parts]), level=level))
    return out


@torch.no_grad()
def evaluate_held_out(objective: Objective, batches: list[AVBatch], seed: int, models: Models) -> dict[str, float]:
    """Held-out means of the student's terms. Fixed: batches, noise, levels; only the weights differ between calls."""
    sums: dict[str, float] = {}
    for batch in batches:
        terms = objective(models, batch, StepInfo(seed=seed, step=0, stage_step=0))["student"]
        counts = batch.samples != PADDING_SAMPLE
        for term in terms:
            sums[term.key] = sums.get(term.key, 0.0) + float(term.values[counts].mean(-1).sum())
    rows = sum(int((batch.samples != PADDING_SAMPLE).sum()) for batch in batches)
    return distributed.weighted_mean({key: value / max(1, rows) for key, value in sums.items()}, rows)


def loop_config(config: RunConfig) -> LoopConfig:
    return LoopConfig(
        name=config.stage,
        seed=config.seed,
        steps=config.steps,
        batch=config.data.batch,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.checkpoint.every,
        sequence=config.engine.sequence,
        skip_nonfinite=config.skip_nonfinite,
    )
