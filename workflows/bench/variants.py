"""One variant of ``mfctl bench train``: its networks, and turns of any number of steps."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mfcore.objectives.losses import Term, report
from mfcore.types import AVBatch
from workflows.bench import roofline
from workflows.bench import synthetic_data as noise
from workflows.bench.reference_loop import NEVER, BareLoop, bare_loop, dmd_loop, with_full_copy
from workflows.config.run import EngineConfig, RunConfig
from workflows.data.batches import Share, TrainingBatches
from workflows.data.clip_loader import prefetched
from workflows.tracking.tracker import Silent
from workflows.training.loop import Surroundings, count_tokens, loop_config, over_all_ranks, run_loop
from workflows.training.metrics import NO_LOSS
from workflows.training.networks import build_networks, initial_network
from workflows.training.objectives import objective_of
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
class Turn:
    """What a turn took, and the loss at its end, over all ranks. Seconds of a step."""

    step_s: float
    wait_s: float  # of step_s: until the batch was there
    cpu_s: float  # of all threads of the process: unlike time, it does not grow when others use the cores
    loss: float


class Runner(Protocol):
    """Takes steps, going on where it stopped."""

    def run(self, batches: Batches, steps: int) -> None: ...

    def loss(self) -> float:
        """Of the last step, over all ranks. Called by all of them, when no time is taken."""
        ...


class Turns:
    """A runner with batches of its own."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        self._config, self._bare = config, variant.engine is None
        self._runner: Runner = EngineRunner(config, variant.engine) if variant.engine else BareRunner(config, variant)
        self._batches: Iterator[list[AVBatch]] = iter(())

    def probe(self, first: Sequence[list[AVBatch]]) -> int:
        """Take the first steps. Returns the most bytes that were alive at an update of the weights."""
        with roofline.bytes_at_update() as seen:
            self._runner.run(first, len(first))
        batches = own_batches(self._config)
        make: Callable[[int], list[AVBatch]] = lambda step: place(batches.step(step))
        self._batches = prefetched(make, len(first), NEVER, self._config.data.prefetch)
        return max(seen)

    def turn(self, steps: int) -> Turn:
        coming = itertools.islice(self._batches, steps)
        watch = Watch(iter(list(coming)) if self._bare else coming)  # a bare loop finds all its batches ready
        distributed.barrier()
        timing.synchronize()
        began, used = time.perf_counter(), time.process_time()
        self._runner.run(watch, steps)
        timing.synchronize()
        took, used = time.perf_counter() - began, time.process_time() - used
        return Turn(step_s=took / steps, wait_s=watch.waited / steps, cpu_s=used / steps, loss=self._runner.loss())


class Watch:
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[list[AVBatch]]) -> None:
        self._batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[list[AVBatch]]:
        return self

    def __next__(self) -> list[AVBatch]:
        asked = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.waited += time.perf_counter() - asked


class BareRunner:
    """A bare loop."""

    def __init__(self, config: RunConfig, variant: Variant) -> None:
        if variant.full_copy:
            config = with_full_copy(config)
        if variant.compiled:
            config = replace(config, engine=replace(config.engine, compile=True))
        self._loop: BareLoop = dmd_loop(config, variant.dmd) if variant.dmd else bare_loop(config)
        self._step = 0
        self._terms: list[Term] = []

    def run(self, batches: Batches, steps: int) -> None:
        self._terms = self._loop.run(batches, self._step, self._step + steps)
        self._step += steps

    def loss(self) -> float:
        return _sum_of_losses(report(over_all_ranks(self._terms)))


class EngineRunner:
    """The training loop, with everything of a run but evaluations, checkpoints and what watches over them."""

    def __init__(self, config: RunConfig, engine: EngineConfig) -> None:
        self._config = config = replace(config, engine=engine)
        self._networks = build_networks(config, initial_network(config, {}).to(distributed.device()))
        self._objective = objective_of(config)
        self._progress = Progress(step=0, samples_seen=0, first={}, last={})
        self._log = LastLog()

    def run(self, batches: Batches, steps: int) -> None:
        until = replace(self._config, steps=self._progress.step + steps)
        self._progress = run_loop(
            replace(loop_config(until), eval_every=NEVER, save_every=NEVER),
            self._progress,
            engines=self._networks.engines,
            optims=self._networks.optims,
            ema=self._networks.ema,
            objective=self._objective,
            batches=batches,
            evaluate=lambda _: {},
            count_tokens=lambda batch: count_tokens(self._config, batch),
            tracker=self._log,
            saver=NoSaver(),
            around=Surroundings(
                notice=lambda: "",
                beat=lambda step, doing: None,
                name_clips=lambda samples: [str(int(i)) for i in samples],
                say=lambda text: None,
            ),
        )

    def loss(self) -> float:
        return _sum_of_losses(self._log.metrics)


class LastLog(Silent):
    """A tracker that keeps the latest entry."""

    def __init__(self) -> None:
        self.metrics: Mapping[str, float] = {}

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        del step, late
        self.metrics = metrics


class NoSaver:
    """No checkpoints."""

    failed = False

    def save(self, progress: Progress) -> None: ...

    def wait(self) -> None: ...


def _sum_of_losses(metrics: Mapping[str, float]) -> float:
    """Over ``name/modality``; bins, rates and norms left out."""
    odd = (*NO_LOSS, "held_out/")
    return sum(v for k, v in metrics.items() if k.count("/") == 1 and not k.startswith(odd))


def own_batches(config: RunConfig, rank: int | None = None, world: int | None = None) -> TrainingBatches:
    """A rank's share of batches of noise; default: this rank's."""
    clips = noise.noise_clips(config.model, config.data.chunks[1], config.data.batch)
    together = config.engine.sequence
    rank, world = (rank or distributed.rank()) // together, (world or distributed.world()) // together
    share = Share(rank=rank, world=world, unit=config.unit)
    return TrainingBatches(clips, noise.assembly(config.model), config.data, config.seed, share)


def place(micros: list[AVBatch]) -> list[AVBatch]:
    return [micro.to(distributed.device()) for micro in micros]
