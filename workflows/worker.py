"""What every rank of a training run does, under Ray Train or without it."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcore.ema import Ema
from mfcore.types import AVBatch
from preprocessing.lease import LeaseLost, check_token
from preprocessing.reader import ClipDataset, open_dataset
from preprocessing.schema import ClipTensors
from preprocessing.storage import Store
from workflows import config_io, ranks
from workflows.checkpoint import CheckpointWriter, ModelCard, Progress, complete, read_json, restore, write_json
from workflows.config import RunConfig, Stage
from workflows.data import Assembly, Clips, Share, TrainingBatches, held_out_batches, prefetched
from workflows.engine import NonFiniteError, build_engine
from workflows.loop import LoopConfig, evaluate_terms, run_loop
from workflows.stages import STAGES, held_out_objective, initial_network, objective_of
from workflows.tracking import Silent, Tracker, open_tracker

RECORD = "run.json"
OUTCOME = "outcome.json"
LOG = "log.txt"
CACHE_BYTES = 1 << 30  # decoded clips kept per rank


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as the driver hands it to the ranks."""

    config: RunConfig
    card: ModelCard
    data: str  # dataset
    parents: dict[Stage, Path]
    run_dir: Path
    tracking_uri: str
    token: str  # of the run's lease: a rank of a dead driver finds another one and writes nothing


def work(job: Job) -> None:
    """Train to the end of the stage, from the latest complete checkpoint if there is one.

    Rank 0 leaves ``outcome.json``. A loss that is not finite is an outcome too: trying again would give it again.
    """
    tracker = _tracker(job)
    try:
        progress = _train(job, tracker)
    except NonFiniteError as error:
        _finish(job, tracker, {"error": str(error)})
        return
    _finish(job, tracker, {"progress": config_io.dump(progress)})


def _train(job: Job, tracker: Tracker) -> Progress:
    config, device = job.config, ranks.device()
    plan = STAGES[config.stage]
    student = initial_network(config, job.parents).to(device)
    ema = Ema(student, config.ema)
    nets = {name: copy.deepcopy(student) for name in plan.trained}
    optims = {name: config.fake_optim if name == "fake" else config.optim for name in plan.trained}
    optims = {name: optim for name, optim in optims.items() if optim is not None}
    engines = {name: build_engine(net, optims[name], config.engine) for name, net in nets.items()}
    start = Progress(step=0, samples_seen=0, first={}, last={})
    if saved := complete(job.run_dir / "checkpoints"):
        start = restore(saved[-1], engines, ema)
        _say(job, f"{config.stage} goes on from step {start.step}")
    share = Share(rank=ranks.rank(), world=ranks.world())
    train, held_out, assembly = _splits(job)
    batches = TrainingBatches(train, assembly, config.data, config.seed, share)
    judged = [b.to(device) for b in held_out_batches(held_out, assembly, config.data, config.seed, share)]
    objective = held_out_objective(config)
    return run_loop(
        loop_config(config),
        start,
        engines=engines,
        optims=optims,
        ema=ema,
        objective=objective_of(config),
        batches=prefetched(
            lambda step: [b.to(device) for b in batches.step(step)], start.step, config.steps, config.data.prefetch
        ),
        evaluate=lambda models: evaluate_terms(objective, judged, config.seed, models),
        count_tokens=lambda batch: count_tokens(config, batch),
        tracker=tracker,
        save=CheckpointWriter(
            job.run_dir / "checkpoints",
            engines=engines,
            ema=ema,
            card=job.card,
            facts=_facts(job, tracker),
            keep=config.checkpoint.keep,
            may_write=lambda: _is_ours(job),
        ).save,
        say=lambda text: _say(job, text),
    )


def loop_config(config: RunConfig) -> LoopConfig:
    return LoopConfig(
        name=config.stage,
        seed=config.seed,
        steps=config.steps,
        batch=config.data.batch,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.checkpoint.every,
    )


def count_tokens(config: RunConfig, batch: AVBatch) -> int:
    """Tokens that the network attends with, head and history not counted."""
    return sum(
        s.latents.shape[0] * s.latents.shape[1] * config.model.branches[m].tokens for m, s in batch.streams.items()
    )


def _splits(job: Job) -> tuple[Clips, Clips, Assembly]:
    plan, config = STAGES[job.config.stage], job.config.data
    train, held_out = open_dataset(job.data, plan.modalities).held_out(config.held_out)
    assembly = Assembly(timeline=job.card.timeline, stats=job.card.stats)
    return cached_clips(train), cached_clips(held_out), assembly


def cached_clips(dataset: ClipDataset, limit: int = CACHE_BYTES) -> Clips:
    """The clips of a dataset, the first ``limit`` bytes of latents kept in memory: shuffled reads are slow on disk."""
    kept: dict[int, ClipTensors] = {}
    size = 0

    def read(i: int) -> ClipTensors:
        nonlocal size
        if i in kept:
            return kept[i]
        clip = dataset.clip(i)
        weight = sum(x.nbytes for x in (clip.video, clip.audio) if x is not None)
        if size + weight <= limit:
            kept[i] = clip
            size += weight
        return clip

    return Clips(lengths=dataset.lengths, read=read)


def _facts(job: Job, tracker: Tracker) -> dict[str, Any]:
    """``run.json`` of a checkpoint, but for the progress."""
    return read_json(job.run_dir / RECORD) | {"mlflow_run": tracker.run_id}


def _is_ours(job: Job) -> bool:
    try:
        check_token(Store(str(job.run_dir)), job.token)
    except LeaseLost:
        return False
    return True


def _tracker(job: Job) -> Tracker:
    """Rank 0's: the run's MLflow run, continued when the run was begun before."""
    if ranks.rank() != 0:
        return Silent()
    place = job.run_dir / "mlflow.json"
    known = read_json(place)["run"] if place.exists() else None
    tracker = open_tracker(
        uri=job.tracking_uri,
        folder=job.run_dir,
        experiment="train",
        name=job.run_dir.name,
        run_id=known,
        tags={"stage": job.config.stage, "run_dir": str(job.run_dir), "dataset": job.data},
    )
    if known is None:
        write_json(place, {"uri": job.tracking_uri, "run": tracker.run_id})
        tracker.params(config_io.flatten(config_io.dump(job.config)))
        tracker.artifact(job.run_dir / RECORD, "configuration")
    return tracker


def _finish(job: Job, tracker: Tracker, outcome: dict[str, Any]) -> None:
    tracker.finish(failed="error" in outcome)
    if ranks.rank() == 0:
        write_json(job.run_dir / OUTCOME, {**outcome, "token": job.token, "mlflow_run": tracker.run_id})
    ranks.barrier()


def _say(job: Job, text: str) -> None:
    """A line for people; the driver shows the file as it grows."""
    if ranks.rank() == 0:
        with (job.run_dir / LOG).open("a") as file:
            file.write(text + "\n")
