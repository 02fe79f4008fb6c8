"""The training loop. It depends on Protocols of engine, objective, tracker and saver, and on no stage."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
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
STUDENT = "student"  # the network that is trained; the others help to train it

Models = Mapping[str, VelocityModel]


class CheckpointSaver(Protocol):
    """Writer of checkpoints. Every method is called by all ranks together."""

    def save(self, progress: Progress) -> object:
        """Start a checkpoint."""
        ...

    @property
    def has_failed(self) -> bool:
        """True if this rank could not write its part of the checkpoint in progress."""
        ...

    def wait(self) -> None:
        """Wait for the checkpoint in progress; raise its error."""
        ...


class TrainingInterrupted(RuntimeError):
    """The run ended early on a stop request, after a checkpoint. Raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """Losses of one round of a micro-batch."""

    micro: AVBatch
    terms: dict[str, list[LossTerm]]  # detached, by network
    rest: Iterator[dict[str, list[LossTerm]]]  # further rounds


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """Everything that takes part in the training of one stage."""

    config: RunConfig
    engines: Mapping[str, Engine]
    optims: Mapping[str, OptimConfig]
    ema: Ema
    objective: Objective
    evaluate: Callable[[Models], dict[str, float]]  # held-out terms
    tracker: Tracker
    saver: CheckpointSaver
    stop_reason: Callable[[], str]  # of this rank; "" while it continues
    clip_ids: Callable[[Tensor], list[str]]  # clip ids of sample numbers
    # called with the step and the activity of this rank in it
    heartbeat: Callable[[int, str], object] = lambda step, activity: None
    # called on all ranks after each step with the metrics about to be logged; returns more metrics
    on_step_end: Callable[[Progress, Mapping[str, float]], dict[str, float]] = lambda progress, metrics: {}
    # context that records the first block with non-finite activations of each network
    record_non_finite: Callable[[], AbstractContextManager[Mapping[str, str]]] = lambda: nullcontext({})
    meter: ThroughputMeter = field(default_factory=ThroughputMeter)

    def run(self, start: Progress, batches: Iterable[list[AVBatch]]) -> Progress:
        """Train from ``start`` to the end of the stage and return the final progress, which is saved.

        Args:
            start: Step 0, or the progress of a loaded checkpoint.
            batches: This rank's micro-batches of each step from ``start.step`` on.

        Raises:
            NonFiniteError, TrainingInterrupted, the saver's error: On all ranks together, between two steps.
        """
        progress = self._evaluate_initial(start) if start.step == 0 else start
        for micros in batches:
            self.meter.batch_ready()
            passes = self._compute(micros, progress.step)
            bad, must_stop = self._sync(passes, progress.step)
            bad, metrics = self._update(progress, passes, bad=bad)
            progress = self._count(progress, bad=bad)
            progress = self._report(progress, [] if bad else passes, metrics)
            self._save(progress, must_stop=must_stop)
            self.heartbeat(progress.step, "fetching the batch of")
            self.meter.step_end()
        self.saver.wait()
        return progress

    @cached_property
    def models(self) -> Models:
        """The networks by name, as objectives expect them."""
        return {"ema": self.ema.model} | {name: e.module for name, e in self.engines.items()}

    def _evaluate_initial(self, start: Progress) -> Progress:
        """Evaluate the initial network before step 1."""
        first = self.evaluate(self.models)
        progress = replace(start, first=first, last=first)
        self.tracker.log(0, {STEP_KEY: 0, **prefix_held_out(first)})
        _LOGGER.info(progress_event(self.config.stage, self.config.steps, progress, {}))
        return progress

    def _compute(self, micros: Sequence[AVBatch], step: int) -> list[MicroBatchResult]:
        """Compute the losses and gradients of the first round."""
        self.heartbeat(step, "computing")
        info, models = StepInfo(seed=self.config.seed, step=step, stage_step=step), self.models
        passes = [self._backward(micro, self.objective.rounds(models, micro, info)) for micro in micros]
        samples = sum(len(m.samples) for m in micros)
        tokens = sum(count_tokens(self.config, m) for m in micros)
        group = self.config.engine.sequence  # ranks with the same clips
        self.meter.count(samples / group, tokens / group)
        return [p for p in passes if p]

    def _backward(self, micro: AVBatch, rounds: Iterator[dict[str, list[LossTerm]]]) -> MicroBatchResult | None:
        """Compute the next round of a micro-batch; None if there is none.

        Engines average gradients over the ranks, and shards may differ in size. So each micro-batch is weighted by
        its part of the global batch. Where rows differ in kind, each micro-batch has them in equal parts. Ranks with
        the same clips count as one: the mean over them is the gradient of a whole clip.
        """
        shards = distributed.get_world_size() // self.config.engine.sequence
        if (terms := next(rounds, None)) is None:
            return None
        for name, own in terms.items():
            weight = len(micro.samples) * shards / self.config.data.batch
            self.engines[name].backward(total_loss(own) * weight)
        detached = {name: [replace(t, values=t.values.detach()) for t in own] for name, own in terms.items()}
        return MicroBatchResult(micro=micro, terms=detached, rest=rounds)

    def _sync(self, passes: Sequence[MicroBatchResult], step: int) -> tuple[bool, bool]:
        """Return, equal on all ranks, if a number of the step is non-finite and if a rank must stop.

        Raises the error of the saver if a rank could not write its part of a checkpoint.
        """
        self.heartbeat(step, "waiting for the others")
        bad, must_stop, unsaved = sync_flags(
            passes, self.engines, must_stop=bool(self.stop_reason()), save_failed=self.saver.has_failed
        )
        self.heartbeat(step, "updating")
        if unsaved:
            self.saver.wait()  # raises
        return bad, must_stop

    def _update(
        self, progress: Progress, first: Sequence[MicroBatchResult], *, bad: bool
    ) -> tuple[bool, dict[str, float]]:
        """Update the weights, or skip the step. Return if it was skipped, and learning rates and gradient norms.

        The fake score moves first, and again with each further round. The student moves once, and its EMA last.
        """
        passes, metrics = first, dict[str, float]()
        while not bad:
            metrics |= self._step_optimizers(progress.step, [name for name in passes[0].terms if name != STUDENT])
            results = [self._backward(own.micro, own.rest) for own in passes]
            again = [result for result in results if result]
            if not again:
                metrics |= self._step_optimizers(progress.step, [STUDENT])
                self.ema.update(self.engines[STUDENT].weights(), progress.step)
                return False, metrics
            bad, _ = self._sync(again, progress.step)
            passes = again
        self._skip_step(progress, passes, names=list(first[0].terms), blocks=self._locate(first, progress.step))
        return True, {}

    @torch.no_grad()
    def _locate(self, passes: Sequence[MicroBatchResult], step: int) -> list[str]:
        """Return the blocks and chunks of this rank with the first non-finite numbers, by another forward pass."""
        info = StepInfo(seed=self.config.seed, step=step, stage_step=step)
        with self.record_non_finite() as found:
            for own in passes:
                next(self.objective.rounds(self.models, own.micro, info), None)
        return [f"{name}: {text}" for name, text in found.items()]

    def _skip_step(
        self, progress: Progress, passes: Sequence[MicroBatchResult], *, names: Sequence[str], blocks: list[str]
    ) -> None:
        """Discard the gradients of a non-finite step. Raise NonFiniteError after ``skip_nonfinite`` such steps."""
        engines = {name: self.engines[name] for name in names}
        local = [describe_non_finite(p, self.clip_ids) for p in passes if not _is_finite(p.terms)]
        gradients = [f"the gradient of {n}" for n, engine in engines.items() if bool(engine.has_non_finite_gradient)]
        if gradients and not local:
            clips = [clip for p in passes for clip in self.clip_ids(p.micro.samples)]
            local = [f"{', '.join(gradients)} on clips {', '.join(clips)}"]
        found = _join_by_rank([*local, *blocks])
        text = f"stage {self.config.stage}, step {progress.step}: not finite: {found}"
        if progress.skipped >= self.config.skip_nonfinite:
            raise NonFiniteError(
                f"{text}. The weights are unchanged by this step; {progress.skipped} such steps were skipped before. "
                "Lower optim.lr, raise optim.warm_up, check those clips, or allow more with --set skip_nonfinite=N. "
                "Then run the same command to resume from the last checkpoint"
            )
        _LOGGER.warning(f"{text}. Step skipped ({progress.skipped + 1} of {self.config.skip_nonfinite})")
        for engine in engines.values():
            engine.discard_gradients()

    def _step_optimizers(self, step: int, names: Sequence[str]) -> dict[str, float]:
        """Run one optimizer step of each of these networks. Return gradient norms and learning rates."""
        rates = {name: learning_rate(self.optims[name], step, self.config.steps) for name in names}
        norms = {name: self.engines[name].step(rate) for name, rate in rates.items()}
        return {f"grad_norm/{n}": v for n, v in norms.items()} | {f"lr/{n}": v for n, v in rates.items()}

    def _count(self, progress: Progress, *, bad: bool) -> Progress:
        step = progress.step + 1
        skipped = progress.skipped + int(bad)
        return replace(progress, step=step, samples_seen=step * self.config.data.batch, skipped=skipped)

    def _report(
        self, progress: Progress, passes: Sequence[MicroBatchResult], update_metrics: Mapping[str, float]
    ) -> Progress:
        """Log, evaluate and generate samples where they are due. Return the progress with the latest evaluation."""
        config, step = self.config, progress.step
        is_last, metrics = step == config.steps, dict[str, float]()
        if step % config.log_every == 0 or is_last:
            terms = gather_terms(term for p in passes for own in p.terms.values() for term in own)
            speed = self.meter.collect((config.steps - step) * config.data.batch)
            metrics = summarize_terms(terms) | dict(update_metrics) | speed
        if step % config.eval_every == 0 or is_last:
            with self.meter.exclude():
                progress = replace(progress, last=self.evaluate(self.models))
            metrics |= prefix_held_out(progress.last)
        if metrics:
            _LOGGER.info(progress_event(config.stage, config.steps, progress, metrics))
        with self.meter.exclude():
            metrics |= self.on_step_end(progress, metrics)
        if metrics:
            self.tracker.log(step, {STEP_KEY: progress.samples_seen, **metrics})
        return progress

    def _save(self, progress: Progress, *, must_stop: bool) -> None:
        """Save a checkpoint where one is due. Raise TrainingInterrupted on a stop request."""
        config, is_last = self.config, progress.step == self.config.steps
        if is_last or must_stop or crosses_interval(progress.samples_seen, config.data.batch, config.checkpoint.every):
            with self.meter.saving():
                self.saver.save(progress)
        if must_stop and not is_last:
            self.saver.wait()
            reason = self.stop_reason()
            reasons = _join_by_rank([reason] if reason else [])
            raise TrainingInterrupted(
                f"stage {config.stage} stopped after step {progress.step} of {config.steps} ({reasons}). "
                "Its checkpoint is written. Run the same command to resume"
            )


def count_tokens(config: RunConfig, batch: AVBatch) -> int:
    """Return the number of tokens in the batch, without head and history."""
    counts = [
        s.latents.shape[0] * s.latents.shape[1] * config.model.branches[m].tokens for m, s in batch.streams.items()
    ]
    return sum(counts)


def sync_flags(
    passes: Sequence[MicroBatchResult], engines: Mapping[str, Engine], *, must_stop: bool, save_failed: bool
) -> list[bool]:
    """Return, true on all ranks if on any: a non-finite loss or gradient, a stop request, a failed save."""
    losses = [t.values for p in passes for own in p.terms.values() for t in own if t.values.numel()]
    bad = torch.stack([~torch.isfinite(values).all() for values in losses]).any()
    for engine in engines.values():
        bad = bad | engine.has_non_finite_gradient
    rest = torch.tensor([must_stop, save_failed], device=bad.device)
    return distributed.all_reduce_any(torch.cat([bad[None], rest]))


def _join_by_rank(texts: list[str]) -> str:
    """Return the texts of all ranks, each with its rank. Called by all ranks together."""
    gathered = enumerate(distributed.all_gather_object(texts))
    return "; ".join(f"rank {rank}: {text}" for rank, own in gathered for text in own)


def describe_non_finite(found: MicroBatchResult, name_clips: Callable[[Tensor], list[str]]) -> str:
    """Return the non-finite losses and the clips of their micro-batch as text."""
    keys = [t.key for own in found.terms.values() for t in own if not torch.isfinite(t.values).all()]
    samples = found.micro.samples
    clips = ", ".join(name_clips(samples))
    return f"the loss {', '.join(keys)} on clips {clips} (samples {int(samples[0])}..{int(samples[-1])})"


def _is_finite(terms: Mapping[str, list[LossTerm]]) -> bool:
    return all(bool(torch.isfinite(t.values).all()) for own in terms.values() for t in own)


def crosses_interval(samples: int, batch: int, every: int) -> bool:
    """Return True if the latest step passed a multiple of ``every`` samples."""
    return samples // every > (samples - batch) // every


def prefix_held_out(terms: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation under their logged names."""
    return {f"held_out/{key}": value for key, value in terms.items()}


def gather_terms(terms: Iterable[LossTerm]) -> list[LossTerm]:
    """Return one term per name and modality with the rows of all micro-batches and ranks. Called by all ranks."""
    own = [replace(t, values=t.values.detach().cpu(), level=None if t.level is None else t.level.cpu()) for t in terms]
    groups: dict[str, list[LossTerm]] = {}
    for part in distributed.all_gather_object(own):
        for term in part:
            groups.setdefault(term.key, []).append(term)
    out: list[LossTerm] = []
    for parts in groups.values():
        levels = [p.level for p in parts if p.level is not None]
        level = torch.cat(levels) if len(levels) == len(parts) else None
        out.append(replace(parts[0], values=torch.cat([p.values for p in parts]), level=level))
    return out


@torch.no_grad()
def evaluate_held_out(objective: Objective, batches: list[AVBatch], seed: int, models: Models) -> dict[str, float]:
    """Return held-out means of the student's terms, always with the same batches, noise and levels."""
    sums: dict[str, float] = {}
    for batch in batches:
        terms = objective(models, batch, StepInfo(seed=seed, step=0, stage_step=0))["student"]
        counts = batch.samples != PADDING_SAMPLE
        for term in terms:
            sums[term.key] = sums.get(term.key, 0.0) + float(term.values[counts].mean(-1).sum())
    rows = sum(int((batch.samples != PADDING_SAMPLE).sum()) for batch in batches)
    return distributed.weighted_mean({key: value / max(1, rows) for key, value in sums.items()}, rows)
