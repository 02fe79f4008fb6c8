"""The real loop, engines and checkpoints around a network of a hundred weights: many runs per second."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.flow import TimeConfig
from mfcore.objectives.flow_matching import FlowMatchingConfig
from mfcore.objectives.losses import Objective
from mfcore.optim import OptimConfig
from tests.helpers.checkpoint_parts import CARD
from tests.helpers.linear_network import LinearVelocity, SelfTaught, toy_batch
from workflows.checkpoints.store import CheckpointStore
from workflows.config.run import CheckpointConfig, DataConfig, EngineConfig, RunConfig
from workflows.data.batches import RankShard
from workflows.tracking.tracker import NullTracker
from workflows.training.checkpointing import CheckpointWriter, latest_intact_checkpoint, load_training_state
from workflows.training.engines.base import build_engine
from workflows.training.loop import TrainingLoop
from workflows.training.progress import Progress
from workflows.training.run_log import redirect_logs
from workflows.utils import distributed

OPTIM = OptimConfig(lr=1e-2, clip=0.3, warm_up=3)


class ListTracker(NullTracker):
    """Tracker that keeps all entries, on every rank."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.entries.append({"step": step, **metrics})


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A run of ``steps`` steps in ``root``; resumed if it has a checkpoint."""

    root: str
    kind: str  # "torch" or a ZeRO stage
    steps: int = 12
    until: int | None = None  # step after which a stop request arrives
    batch: int = 12
    unit: int = 1
    micro: int | None = None
    every: int = 1 << 30  # samples between checkpoints
    objective: Callable[[], Objective] = SelfTaught
    bad: dict[int, str] = field(default_factory=dict)  # sample number -> "loss" or "gradient" that is not finite there
    skip: int = 0
    seed: int = 0  # of the initial weights


@dataclass(frozen=True, kw_only=True)
class Result:
    """Results of one rank."""

    losses: dict[int, dict[str, float]]  # by step: losses and gradient norms
    weights: dict[str, dict[str, torch.Tensor]]
    error: Exception | None
    progress: Progress | None
    messages: list[str]  # logged


class ListHandler(logging.Handler):
    """Keep the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def toy_run(toy: Toy) -> Result:
    """Train, on all ranks together. The result contains an error of the loop."""
    handler = ListHandler()
    with redirect_logs(handler):
        return replace(_toy_run(toy), messages=handler.messages)


def _toy_run(toy: Toy) -> Result:
    config = EngineConfig(kind="torch") if toy.kind == "torch" else EngineConfig(zero_stage=int(toy.kind))
    nets = {name: LinearVelocity(seed=toy.seed + i) for i, name in enumerate(("student", "fake"))}
    ema = Ema(nets["student"], EmaConfig(decay=0.9))
    engines = {name: build_engine(net, OPTIM, config) for name, net in nets.items()}
    store, tracker, steps = CheckpointStore(Path(toy.root)), ListTracker(), [0]
    is_last_rank = distributed.get_rank() == distributed.get_world_size() - 1
    start = Progress(step=0, samples_seen=0, first={}, last={})
    if name := latest_intact_checkpoint(store):
        start = load_training_state(store, name, engines, ema)
    saver = CheckpointWriter(
        store, engines=engines, ema=ema, metadata=CARD, record=lambda _: {}, keep=9, may_write=lambda: True
    )
    error, progress = None, None
    try:
        loop = TrainingLoop(
            config=_run_config(toy, config),
            engines=engines,
            optims=dict.fromkeys(engines, OPTIM),
            ema=ema,
            objective=_Poisoned(toy),
            evaluate=lambda models: {},
            tracker=tracker,
            saver=saver,
            stop_reason=lambda: "requested" if is_last_rank and steps[-1] + 1 == toy.until else "",
            heartbeat=lambda step, activity: steps.append(step),
            clip_ids=lambda samples: [f"clip-{int(s)}" for s in samples],
        )
        progress = loop.run(start, _batches(toy, start.step))
    except (RuntimeError, ValueError) as raised:
        error = raised
    saver.close()
    keep = ("/audio", "grad_norm/")
    losses = {e["step"]: {k: v for k, v in e.items() if any(word in k for word in keep)} for e in tracker.entries}
    weights = {name: {k: v.clone() for k, v in engine.weights()} for name, engine in engines.items()}
    weights["ema"] = {k: v.clone() for k, v in ema.weights()}
    return Result(losses=losses, weights=weights, error=error, progress=progress, messages=[])


def _run_config(toy: Toy, engine: EngineConfig) -> RunConfig:
    return RunConfig(
        stage="audio",
        steps=toy.steps,
        model=CARD.model,
        objective=FlowMatchingConfig(time=TimeConfig(shift={"audio": 1.0})),
        optim=OPTIM,
        data=DataConfig(batch=toy.batch, chunks=(2, 2)),
        engine=engine,
        checkpoint=CheckpointConfig(every=toy.every),
        log_every=1,
        eval_every=1000,
        skip_nonfinite=toy.skip,
    )


def _batches(toy: Toy, first: int):
    share = RankShard(rank=distributed.get_rank(), world=distributed.get_world_size(), unit=toy.unit)
    for step in range(first, toy.steps):
        parts = share.micro_batches(toy.batch, toy.micro)
        yield [toy_batch(step * toy.batch + part.start, part.stop - part.start) for part in parts]


class TwoRounds(SelfTaught):
    """A second update of the fake score in each step, with other noise."""

    def rounds(self, models, batch, info):
        yield self(models, batch, info)
        yield {"fake": self(models, batch, replace(info, seed=info.seed + 1))["fake"]}


class _Poisoned:
    """The objective, with non-finite numbers at some samples."""

    def __init__(self, toy: Toy) -> None:
        self._toy, self._objective = toy, toy.objective()
        self.needs = self._objective.needs

    def __call__(self, models, batch, info):
        return next(self.rounds(models, batch, info))

    def rounds(self, models, batch, info):
        for terms in self._objective.rounds(models, batch, info):
            for row, sample in enumerate(batch.samples.tolist()):
                self._spoil(terms, row, self._toy.bad.get(sample, ""))
            yield terms

    def _spoil(self, terms, row, how):
        if how == "second round" and "student" not in terms:
            terms["fake"][0].values[row] *= math.nan
        if how == "loss" and "student" in terms:
            terms["student"][0].values[row] *= math.nan
        if how == "gradient" and "student" in terms and torch.is_grad_enabled():
            terms["student"][0].values.register_hook(lambda g: g * math.inf)


def largest_error(one: Result, other: Result, first: int = 1) -> float:
    """Return the largest relative difference of the logged numbers from step ``first`` on."""
    steps = [step for step in other.losses if step >= first and other.losses[step]]
    assert steps and all(one.losses[step].keys() == other.losses[step].keys() for step in steps)
    return max(abs(one.losses[s][k] - v) / abs(v) for s in steps for k, v in other.losses[s].items())
