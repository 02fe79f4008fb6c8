"""What every rank of a training run does, under Ray Train or without it."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfcore.ema import Ema
from mfcore.model.compile import NoCompiler
from mfcore.types import AVBatch
from preprocessing.dataset.reader import open_dataset
from preprocessing.io.lease import LeaseLost, check_token
from preprocessing.io.storage import Store
from workflows.checkpoints.layout import OUTCOME, RECORD
from workflows.checkpoints.model_card import ModelCard
from workflows.checkpoints.store import Shelf, checkpoints_of
from workflows.config import serialization
from workflows.config.run import RunConfig, Stage
from workflows.config.stages import STAGES
from workflows.data.batches import Clips, Share, TrainingBatches, clips_of, held_out_batches
from workflows.data.clip_loader import prefetched
from workflows.data.collate import Assembly
from workflows.tracking.mlflow_sync import open_training_tracker
from workflows.tracking.tracker import PARAMS, Silent, Tracker
from workflows.training import preemption
from workflows.training.async_samples import Snapshots
from workflows.training.checkpointing import CheckpointWriter, newest_whole, restore
from workflows.training.collapse_alarms import HistoryWatch
from workflows.training.engines.base import NonFiniteError
from workflows.training.heartbeat import BEATS, Pulse
from workflows.training.loop import (
    Stopped,
    Surroundings,
    count_tokens,
    evaluate_terms,
    loop_config,
    run_loop,
)
from workflows.training.memory_check import DoesNotFit, refuse_together
from workflows.training.networks import build_networks, initial_network
from workflows.training.objectives import held_out_objective, objective_of, schedule_position
from workflows.training.preemption import Notices
from workflows.training.progress import Progress
from workflows.training.sample_callback import Looks
from workflows.training.samples import Sampler
from workflows.utils import distributed
from workflows.utils.json_io import read_json, write_json

LOG = "log.txt"


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


def work(job: Job, leaving: Callable[[], str] = lambda: "", aside: Snapshots | None = None) -> None:
    """Train to the end of the stage, from the latest complete checkpoint if there is one.

    Rank 0 leaves ``outcome.json``. A loss that is not finite is an outcome too: trying again would give it again. So is
    a notice to end. ``leaving``: the launcher's word that a machine is about to go; such a run is saved, and Stopped
    is raised to the launcher, which starts it again elsewhere. ``aside``: takes the weights of looks that the launcher
    has made while training goes on; None: rank 0 makes them.
    """
    preemption.listen()
    tracker = _tracker(job)
    pulse = Pulse(job.run_dir / BEATS, distributed.rank())
    try:
        progress = _train(job, tracker, pulse, Notices(job.run_dir, job.token, leaving), aside)
    except (NonFiniteError, DoesNotFit, NoCompiler) as error:
        _finish(job, tracker, {"error": str(error)})
    except Stopped as error:
        if any(distributed.gather(leaving())):
            raise
        _finish(job, tracker, {"stopped": str(error)})
    else:
        _finish(job, tracker, {"progress": serialization.dump(progress)})
    finally:
        pulse.close()
        if aside is not None:
            aside.close()


def _train(job: Job, tracker: Tracker, pulse: Pulse, notices: Notices, aside: Snapshots | None) -> Progress:
    config, device = job.config, distributed.device()
    refuse_together(config)
    nets = build_networks(config, initial_network(config, job.parents).to(device))
    engines, ema = nets.engines, nets.ema
    start = Progress(step=0, samples_seen=0, first={}, last={})
    shelf = Shelf(checkpoints_of(job.run_dir, config.checkpoint.to))
    if saved := newest_whole(shelf, lambda text: _say(job, text)):
        start = restore(shelf, saved, engines, ema)
        _say(job, f"{config.stage} goes on from step {start.step} on {distributed.world()} workers")
    train, held_out, assembly = _splits(job)
    together = config.engine.sequence
    share = Share(rank=distributed.rank() // together, world=distributed.world() // together, unit=config.unit)
    batches = TrainingBatches(train, assembly, config.data, config.seed, share)
    every = replace(share, unit=1)
    judged = [b.to(device) for b in held_out_batches(held_out, assembly, config.data, config.seed, every)]
    objective = held_out_objective(config)
    saver = CheckpointWriter(
        shelf,
        engines=engines,
        ema=ema,
        card=job.card,
        facts=lambda progress: _facts(job, tracker, progress),
        keep=config.checkpoint.keep,
        may_write=lambda: _is_ours(job),
    )
    with closing(saver):
        return run_loop(
            loop_config(config),
            start,
            engines=engines,
            optims=nets.optims,
            ema=ema,
            objective=objective_of(config),
            batches=prefetched(
                lambda step: [b.to(device) for b in batches.step(step)], start.step, config.steps, config.data.prefetch
            ),
            evaluate=lambda models: evaluate_terms(objective, judged, config.seed, models),
            count_tokens=lambda batch: count_tokens(config, batch),
            tracker=tracker,
            saver=saver,
            around=Surroundings(
                notice=notices,
                beat=pulse,
                name_clips=batches.clip_ids,
                say=lambda text: _say(job, text),
                look=_looks(job, ema, tracker, pulse, judged, aside),
                watched=nets.watched,
            ),
        )


def _looks(job: Job, ema: Ema, tracker: Tracker, pulse: Pulse, judged: list[AVBatch], aside: Snapshots | None) -> Looks:
    say: Callable[[str], None] = lambda text: _say(job, text)
    if job.config.sample_every:
        kind = "GPU" if job.config.engine.use_gpu else "CPU"
        say(
            "samples are made beside the training, on resources that it leaves free"
            if aside
            else f"samples are made in line, by rank 0 while the others wait: no spare {kind} to make them on"
        )
    sampler = Sampler(job.run_dir, job.data, job.config)
    watch = HistoryWatch(job.run_dir, judged, job.config.objective.time, job.config.seed)
    looped = job.config.stage == "mutual"  # the others train on real history alone
    return Looks(job.run_dir, job.config, job.card, ema, sampler, tracker, pulse, say, watch if looped else None, aside)


def _splits(job: Job) -> tuple[Clips, Clips, Assembly]:
    plan, config = STAGES[job.config.stage], job.config.data
    train, held_out = open_dataset(job.data, plan.modalities).held_out(config.held_out)
    assembly = Assembly(timeline=job.card.timeline, stats=job.card.stats)
    return clips_of(train), clips_of(held_out), assembly


def _facts(job: Job, tracker: Tracker, progress: Progress) -> dict[str, Any]:
    """``run.json`` of a checkpoint, but for the progress: the run's record, and where its schedules stand."""
    position = schedule_position(job.config, progress.step)
    return read_json(job.run_dir / RECORD) | {"mlflow_run": tracker.run_id, "workers": distributed.world(), **position}


def _is_ours(job: Job) -> bool:
    try:
        check_token(Store(str(job.run_dir)), job.token)
    except LeaseLost:
        return False
    return True


def _tracker(job: Job) -> Tracker:
    """Rank 0's: the run's log, continued when the run was begun before."""
    if distributed.rank() != 0:
        return Silent()
    tracker = training_tracker(job.config, job.data, job.run_dir, job.tracking_uri, lambda text: _say(job, text))
    if not (job.run_dir / PARAMS).exists():
        tracker.artifact(job.run_dir / RECORD, "configuration")
        tracker.params(serialization.flatten(serialization.dump(job.config)))
    return tracker


def training_tracker(config: RunConfig, data: str, run_dir: Path, uri: str, say: Callable[[str], None]) -> Tracker:
    """Where the run in ``run_dir`` keeps its log, and from where it is sent on."""
    tags = {"stage": config.stage, "run_dir": str(run_dir), "dataset": data}
    return open_training_tracker(run_dir, uri=uri, experiment="train", tags=tags, say=say)


def _finish(job: Job, tracker: Tracker, outcome: dict[str, Any]) -> None:
    tracker.finish(failed="error" in outcome)
    if distributed.rank() == 0:
        write_json(job.run_dir / OUTCOME, {**outcome, "token": job.token, "mlflow_run": tracker.run_id})
    distributed.barrier()


def _say(job: Job, text: str) -> None:
    """A line for people; the driver shows the file as it grows."""
    if distributed.rank() == 0:
        with (job.run_dir / LOG).open("a") as file:
            file.write(text + "\n")
