"""Variants of ``mfctl bench train``: networks and rounds of any number of steps."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from mfcore.objectives.losses import LossTerm, summarize_terms
from mfcore.types import AVBatch
from preprocessing.io.prefetch import prefetch
from workflows.bench import roofline, synthetic_data
from workflows.bench.reference_loop import ReferenceLoop, dmd_loop, full_copy_loop, reference_loop
from workflows.config.run import EngineConfig, RunConfig
from workflows.data.batches import RankShard, TrainingBatchLoader
from workflows.tracking.tracker import NullTracker
from workflows.training.loop import TrainingLoop, gather_terms
from workflows.training.metrics import NON_LOSS_PREFIXES
from workflows.training.networks import build_initial_network, build_training_networks
from workflows.training.objectives import NEVER, build_objective
from workflows.training.progress import Progress
from workflows.utils import distributed, timing

Batches = Iterable[list[AVBatch]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Loop to time: the training loop with an engine, or a reference loop."""

    engine: EngineConfig | None = None
    dmd: int | None = None  # reference loop of DMD with a separate teacher: fake-score updates per step
    full_copy: bool = False  # reference loop with a full-rank fake score
    compiled: bool = False  # reference loop with compiled blocks


@dataclass(frozen=True, kw_only=True)
class RoundTiming:
    """Seconds per step of one round, and its last loss over all ranks."""

    step_s: float
    wait_s: float  # part of step_s: waiting for the batch
    cpu_s: float  # of all threads of the process; independent of other load
    loss: float


class StepRunner(Protocol):
    """Runs optimizer steps; state is kept between calls."""

    def run(self, batches: Batches, steps: int) -> None:
        """Run ``steps`` optimizer steps."""
        ...

    def loss(self) -> float:
        """Return the loss of the last step over all ranks. Collective, not timed."""
        ...


class VariantRunner:
    """Step runner with a separate stream of batches."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        self._config = config
        self._is_reference = variant.engine is None
        self._runner: StepRunner = (
            EngineRunner(config, variant.engine) if variant.engine else ReferenceRunner(config, variant)
        )
        self._batches: Iterator[list[AVBatch]] = iter(())

    def measure_peak_memory(self, first: Sequence[list[AVBatch]]) -> int:
        """Run the first steps; return the peak bytes at an optimizer step."""
        with roofline.track_bytes_at_step() as bytes_at_step:
            self._runner.run(first, len(first))
        batches = synthetic_batches(self._config)
        later = (to_device(batches.micro_batches(step)) for step in itertools.count(len(first)))
        self._batches = prefetch(later, lambda _: 1, self._config.data.prefetch)
        return max(bytes_at_step)

    def run_round(self, steps: int) -> RoundTiming:
        """Run and time ``steps`` steps."""
        batches = itertools.islice(self._batches, steps)
        if self._is_reference:  # the reference loop does not wait for batches
            batches = iter(list(batches))
        timed = TimedIterator(batches)
        distributed.barrier()
        timing.synchronize()
        started = time.perf_counter()
        cpu_started = time.process_time()
        self._runner.run(timed, steps)
        timing.synchronize()
        wall_s = time.perf_counter() - started
        cpu_s = time.process_time() - cpu_started
        return RoundTiming(
            step_s=wall_s / steps, wait_s=timed.waited_s / steps, cpu_s=cpu_s / steps, loss=self._runner.loss()
        )


class TimedIterator:
    """Iterator over batches that sums the seconds of waiting for them."""

    def __init__(self, batches: Iterator[list[AVBatch]]) -> None:
        self._batches, self.waited_s = batches, 0.0

    def __iter__(self) -> Iterator[list[AVBatch]]:
        return self

    def __next__(self) -> list[AVBatch]:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited_s += time.perf_counter() - started


class ReferenceRunner:
    """Step runner of a reference loop."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        if variant.full_copy:
            config = full_copy_loop(config)
        if variant.compiled:
            config = replace(config, engine=replace(config.engine, compile=True))
        self._loop: ReferenceLoop = dmd_loop(config, variant.dmd) if variant.dmd else reference_loop(config)
        self._step = 0
        self._terms: list[LossTerm] = []

    def run(self, batches: Batches, steps: int) -> None:
        """Run ``steps`` optimizer steps."""
        self._terms = self._loop.run(batches, self._step, self._step + steps)
        self._step += steps

    def loss(self) -> float:
        """Return the loss of the last step over all ranks."""
        return _sum_of_losses(summarize_terms(gather_terms(self._terms)))


class EngineRunner:
    """Step runner of the training loop, without evaluation, checkpoints and monitoring."""

    def __init__(self, config: RunConfig, engine: EngineConfig, student: nn.Module | None = None) -> None:
        """``student``: on this rank's device; None: an initialized network."""
        self._config = config = replace(config, engine=engine)
        self._networks = build_training_networks(
            config, student or build_initial_network(config, {}).to(distributed.local_device())
        )
        self._objective = build_objective(config)
        self._progress = Progress(step=0, samples_seen=0, first={}, last={})
        self._log = LastEntryTracker()

    def run(self, batches: Batches, steps: int) -> None:
        """Run ``steps`` optimizer steps."""
        until = replace(
            self._config,
            steps=self._progress.step + steps,
            eval_every=NEVER,
            checkpoint=replace(self._config.checkpoint, every=NEVER),
        )
        loop = TrainingLoop(
            config=until,
            engines=self._networks.engines,
            optims=self._networks.optims,
            ema=self._networks.ema,
            objective=self._objective,
            evaluate=lambda _: {},
            tracker=self._log,
            saver=NullSaver(),
            stop_reason=lambda: "",
            clip_ids=lambda samples: [str(int(i)) for i in samples],
        )
        self._progress = loop.run(self._progress, batches)

    def loss(self) -> float:
        """Return the loss of the last step over all ranks."""
        return _sum_of_losses(self._log.metrics)


class LastEntryTracker(NullTracker):
    """Tracker that keeps the latest entry."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Keep the metrics."""
        del step, late
        self.metrics = metrics


class NullSaver:
    """Saver that writes no checkpoints."""

    has_failed = False

    def save(self, progress: Progress) -> None:
        """Write nothing."""

    def wait(self) -> None:
        """Return at once."""


def _sum_of_losses(metrics: Mapping[str, float]) -> float:
    """Return the sum over ``name/modality``, without bins, rates and norms."""
    ignored = (*NON_LOSS_PREFIXES, "held_out/")
    return sum(v for k, v in metrics.items() if k.count("/") == 1 and not k.startswith(ignored))


def synthetic_batches(config: RunConfig, rank: int | None = None, world: int | None = None) -> TrainingBatchLoader:
    """Return the noise batches of one rank (default: this rank)."""
    clips = synthetic_data.synthetic_clips(config.model, config.data.chunks[1], config.data.batch)
    sequence = config.engine.sequence
    rank = (rank or distributed.get_rank()) // sequence
    world = (world or distributed.get_world_size()) // sequence
    share = RankShard(rank=rank, world=world, unit=config.rows_per_cycle)
    collator = synthetic_data.synthetic_collator(config.model)
    return TrainingBatchLoader(clips, collator, config.data, seed=config.seed, shard=share)


def to_device(micros: list[AVBatch]) -> list[AVBatch]:
    """Return the micro-batches on this rank's device."""
    return [micro.to(distributed.local_device()) for micro in micros]
