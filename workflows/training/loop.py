"""The training loop. It depends on Protocols of engine, objective, tracker and saver, and on no stage."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mfcore.ema import Ema
from mfcore.errors import UserInputError
from mfcore.objectives.losses import LossTerm, Objective, StepInfo, summarize_terms
from mfcore.optim import OptimConfig
from mfcore.rng import PADDING_SAMPLE
from mfcore.types import AVBatch
from workflows.config.run import RunConfig
from workflows.tracking.tracker import STEP_KEY, Tracker
from workflows.training.engines.base import Engine, NonFiniteError
from workflows.training.metrics import ThroughputMeter, progress_event
from workflows.training.optimization_step import MicroBatchResult, Models, OptimizationStep, StepResult
from workflows.training.progress import Progress
from workflows.utils import distributed

_LOGGER = logging.getLogger(__name__)


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


class MetricsWriteError(RuntimeError):
    """Metrics could not be written; checkpoints are intact. Raised on all ranks."""


class TrainingInterrupted(RuntimeError):
    """The run ended early on a stop request, after a checkpoint. Raised on all ranks."""


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
    _log_errors: list[str] = field(default_factory=list[str], init=False)

    def run(self, start: Progress, batches: Iterable[list[AVBatch]]) -> Progress:
        """Train from ``start`` to the end of the stage and return the final progress, which is saved.

        Args:
            start: Step 0, or the progress of a loaded checkpoint.
            batches: This rank's micro-batches of each step from ``start.step`` on.

        Raises:
            NonFiniteError, TrainingInterrupted, MetricsWriteError, the saver's error: On all ranks together, between
                two steps.
        """
        progress = self._evaluate_initial(start) if start.step == 0 else start
        for micros in batches:
            self.meter.batch_ready()
            result, must_stop = self._step(progress, micros)
            progress = self._count(progress, skipped=not result.is_finite)
            progress = self._report(progress, result)
            self._save(progress, must_stop=must_stop)
            self.heartbeat(progress.step, "fetching the batch of")
            self.meter.step_end()
        self.saver.wait()
        self._raise_log_errors(progress.step)
        return progress

    @cached_property
    def models(self) -> Models:
        """The networks by name, as objectives expect them."""
        return {"ema": self.ema.model} | {name: e.module for name, e in self.engines.items()}

    def _evaluate_initial(self, start: Progress) -> Progress:
        """Evaluate the initial network before step 1."""
        first = self.evaluate(self.models)
        progress = replace(start, first=first, last=first)
        with self._end_later():
            self.tracker.log(0, {STEP_KEY: 0, **prefix_held_out(first)})
        _LOGGER.info(progress_event(self.config.stage, self.config.steps, progress, {}))
        return progress

    @cached_property
    def _optimization(self) -> OptimizationStep:
        return OptimizationStep(
            engines=self.engines,
            optims=self.optims,
            ema=self.ema,
            objective=self.objective,
            models=self.models,
            steps=self.config.steps,
            batch=self.config.data.batch,
            shards=distributed.get_world_size() // self.config.engine.sequence,
        )

    def _step(self, progress: Progress, micros: Sequence[AVBatch]) -> tuple[StepResult, bool]:
        """Update the weights, or skip a non-finite step. Return the losses, and if a rank must stop."""
        step, group = progress.step, self.config.engine.sequence  # group: ranks with the same clips
        self.heartbeat(step, "computing")
        samples = sum(len(m.samples) for m in micros)
        tokens = sum(count_tokens(self.config, m) for m in micros)
        self.meter.count(samples / group, tokens / group)
        stops: list[bool] = []

        def is_finite(results: Sequence[MicroBatchResult]) -> bool:
            if not any(found.terms for found in results):
                raise UserInputError(
                    f"stage {self.config.stage}, step {step}: the objective returned no loss term. Check its weights "
                    "and rows"
                )
            bad, must_stop = self._sync(results, step)
            stops.append(must_stop)
            return not bad

        result = self._optimization.run(micros, self._info(step), is_finite)
        if not result.is_finite:
            self._skip_step(progress, result, self._locate(micros, step))
        return result, any(stops)

    def _info(self, step: int) -> StepInfo:
        return StepInfo(seed=self.config.seed, step=step, stage_step=step)

    def _sync(self, results: Sequence[MicroBatchResult], step: int) -> tuple[bool, bool]:
        """Return, equal on all ranks, if a number of the round is non-finite and if a rank must stop.

        Raises the error of the saver if a rank could not write its part of a checkpoint, MetricsWriteError if one
        could not log.
        """
        self.heartbeat(step, "waiting for the others")
        bad = self._optimization.has_non_finite(results)
        own = [bool(self.stop_reason()), self.saver.has_failed, bool(self._log_errors)]
        rest = torch.tensor(own, device=bad.device)
        is_bad, must_stop, unsaved, unlogged = distributed.all_reduce_any(torch.cat([bad[None], rest]))
        self.heartbeat(step, "updating")
        if unsaved:
            self.saver.wait()  # raises
        if unlogged:
            self._raise_log_errors(step)
        return is_bad, must_stop

    @torch.no_grad()
    def _locate(self, micros: Sequence[AVBatch], step: int) -> list[str]:
        """Return the blocks and chunks of this rank with the first non-finite numbers, by another forward pass."""
        with self.record_non_finite() as found:
            for micro in micros:
                next(self.objective.rounds(self.models, micro, self._info(step)), None)
        return [f"{name}: {text}" for name, text in found.items()]

    def _skip_step(self, progress: Progress, result: StepResult, blocks: Sequence[str]) -> None:
        """Discard the gradients of a non-finite step. Raise NonFiniteError after ``skip_nonfinite`` such steps."""
        first, last = result.rounds[0], result.rounds[-1]
        engines = {name: self.engines[name] for name in first[0].terms}
        local = [describe_non_finite(found, self.clip_ids) for found in last if found.non_finite_losses]
        gradients = [f"the gradient of {n}" for n, engine in engines.items() if bool(engine.has_non_finite_gradient)]
        if gradients and not local:
            clips = [clip for found in last for clip in self.clip_ids(found.micro.samples)]
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

    def _count(self, progress: Progress, *, skipped: bool) -> Progress:
        step = progress.step + 1
        samples = step * self.config.data.batch
        return replace(progress, step=step, samples_seen=samples, skipped=progress.skipped + int(skipped))

    def _report(self, progress: Progress, result: StepResult) -> Progress:
        """Log, evaluate and generate samples where they are due. Return the progress with the latest evaluation."""
        config, step = self.config, progress.step
        is_last, metrics = step == config.steps, dict[str, float]()
        if step % config.log_every == 0 or is_last:
            first = result.rounds[0] if result.is_finite else []
            terms = gather_terms(term for found in first for own in found.terms.values() for term in own)
            speed = self.meter.collect((config.steps - step) * config.data.batch)
            metrics = summarize_terms(terms) | update_metrics(result) | speed
        if step % config.eval_every == 0 or is_last:
            with self.meter.exclude():
                progress = replace(progress, last=self.evaluate(self.models))
            metrics |= prefix_held_out(progress.last)
        if metrics:
            _LOGGER.info(progress_event(config.stage, config.steps, progress, metrics))
        with self.meter.exclude(), self._end_later():
            metrics |= self.on_step_end(progress, metrics)
        if metrics:
            with self._end_later():
                self.tracker.log(step, {STEP_KEY: progress.samples_seen, **metrics})
        return progress

    @contextmanager
    def _end_later(self) -> Iterator[None]:
        """Keep a failed write of one rank, such as on a full disk; it ends the run on all ranks in the next step."""
        try:
            yield
        except OSError as error:
            self._log_errors.append(f"{type(error).__name__}: {error}")

    def _raise_log_errors(self, step: int) -> None:
        """Raise MetricsWriteError if a rank could not log. Called by all ranks together."""
        if errors := _join_by_rank(self._log_errors):
            raise MetricsWriteError(
                f"stage {self.config.stage}: the metrics or samples could not be written until step {step} ({errors}). "
                "Fix the cause, then run the same command to resume from the last checkpoint"
            )

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


def update_metrics(result: StepResult) -> dict[str, float]:
    """Return gradient norms and learning rates under their logged names; nothing for a skipped step."""
    if not result.is_finite:
        return {}
    norms = {f"grad_norm/{name}": norm for name, norm in result.norms.items()}
    return norms | {f"lr/{name}": rate for name, rate in result.rates.items()}


def _join_by_rank(texts: list[str]) -> str:
    """Return the texts of all ranks, each with its rank. Called by all ranks together."""
    gathered = enumerate(distributed.all_gather_object(texts))
    return "; ".join(f"rank {rank}: {text}" for rank, own in gathered for text in own)


def describe_non_finite(found: MicroBatchResult, name_clips: Callable[[Tensor], list[str]]) -> str:
    """Return the non-finite losses and the clips of their micro-batch as text."""
    samples, losses = found.micro.samples, ", ".join(found.non_finite_losses)
    clips = ", ".join(name_clips(samples))
    return f"the loss {losses} on clips {clips} (samples {int(samples[0])}..{int(samples[-1])})"


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
