"""One variant of ``mfctl bench train``: its networks, and turns of any number of steps."""

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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
    """What runs the step: the training loop with an engine, or a bare loop."""

    engine: EngineConfig | None = None
    dmd: int | None = None  # bare loop of DMD with a separate teacher: updates of the fake score per step
    full_copy: bool = False  # bare loop whose fake score is no low-rank one
    compiled: bool = False  # bare loop with compiled blocks


@dataclass(frozen=True, kw_only=True)
class RoundTiming:
    """What a turn took, and the loss at its end, over all ranks. Seconds of a step."""

    step_s: float
    wait_s: float  # of step_s: until the batch was there
    cpu_s: float  # of all threads of the process: unlike time, it does not grow when others use the cores
    loss: float


class StepRunner(Protocol):
    """Takes steps, going on where it stopped."""

    def run(self, batches: Batches, steps: int) -> None: ...

    def loss(self) -> float:
        """Of the last step, over all ranks. Called by all of them, when no time is taken."""
        ...


class VariantRunner:
    """A runner with batches of its own."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        self._config = config
        self._is_reference = variant.engine is None
        self._runner: StepRunner = (
            EngineRunner(config, variant.engine) if variant.engine else ReferenceRunner(config, variant)
        )
        self._batches: Iterator[list[AVBatch]] = iter(())

    def measure_peak_memory(self, first: Sequence[list[AVBatch]]) -> int:
        """Take the first steps. Returns the most bytes that were alive at an update of the weights."""
        with roofline.track_bytes_at_step() as bytes_at_step:
            self._runner.run(first, len(first))
        batches = synthetic_batches(self._config)
        later = (to_device(batches.micro_batches(step)) for step in itertools.count(len(first)))
        self._batches = prefetch(later, lambda _: 1, self._config.data.prefetch)
        return max(bytes_at_step)

    def run_round(self, steps: int) -> RoundTiming:
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
    """Batches, and the seconds that were spent waiting for them."""

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
    """A bare loop."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        if variant.full_copy:
            config = full_copy_loop(config)
        if variant.compiled:
            config = replace(config, engine=replace(config.engine, compile=True))
        self._loop: ReferenceLoop = dmd_loop(config, variant.dmd) if variant.dmd else reference_loop(config)
        self._step = 0
        self._terms: list[LossTerm] = []

    def run(self, batches: Batches, steps: int) -> None:
        self._terms = self._loop.run(batches, self._step, self._step + steps)
        self._step += steps

    def loss(self) -> float:
        return _sum_of_losses(summarize_terms(gather_terms(self._terms)))


class EngineRunner:
    """The training loop, with everything of a run but evaluations, checkpoints and what watches over them."""

    def __init__(self, config: RunConfig, engine: EngineConfig) -> None:
        self._config = config = replace(config, engine=engine)
        self._networks = build_training_networks(
            config, build_initial_network(config, {}).to(distributed.local_device())
        )
        self._objective = build_objective(config)
        self._progress = Progress(step=0, samples_seen=0, first={}, last={})
        self._log = LastEntryTracker()

    def run(self, batches: Batches, steps: int) -> None:
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
        return _sum_of_losses(self._log.metrics)


class LastEntryTracker(NullTracker):
    """A tracker that keeps the latest entry."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        del step, late
        self.metrics = metrics


class NullSaver:
    """No checkpoints."""

    has_failed = False

    def save(self, progress: Progress) -> None: ...

    def wait(self) -> None: ...


def _sum_of_losses(metrics: Mapping[str, float]) -> float:
    """Over ``name/modality``; bins, rates and norms left out."""
    ignored = (*NON_LOSS_PREFIXES, "held_out/")
    return sum(v for k, v in metrics.items() if k.count("/") == 1 and not k.startswith(ignored))


def synthetic_batches(config: RunConfig, rank: int | None = None, world: int | None = None) -> TrainingBatchLoader:
    """A rank's share of batches of noise; default: this rank's."""
    clips = synthetic_data.synthetic_clips(config.model, config.data.chunks[1], config.data.batch)
    sequence = config.engine.sequence
    rank = (rank or distributed.get_rank()) // sequence
    world = (world or distributed.get_world_size()) // sequence
    share = RankShard(rank=rank, world=world, unit=config.rows_per_cycle)
    collator = synthetic_data.synthetic_collator(config.model)
    return TrainingBatchLoader(clips, collator, config.data, seed=config.seed, shard=share)


def to_device(micros: list[AVBatch]) -> list[AVBatch]:
    return [micro.to(distributed.local_device()) for micro in micros]
