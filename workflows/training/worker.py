"""Training on one rank, under Ray Train or in this process."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfcore.ema import Ema
from mfcore.errors import UserInputError
from mfcore.model.compile import CompilerNotFoundError
from mfcore.types import AVBatch
from preprocessing.dataset.reader import ClipDataset, open_dataset
from preprocessing.io.lease import LeaseLostError, verify_lease
from preprocessing.io.prefetch import prefetch
from preprocessing.io.storage import Store
from workflows.checkpoints.layout import OUTCOME_FILE, RUN_FILE
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import CheckpointStore, checkpoint_root
from workflows.config import serialization
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES
from workflows.data.batches import ClipSplit, RankShard, TrainingBatchLoader, clip_split, validation_batches
from workflows.data.collate import BatchCollator
from workflows.tracking.mlflow_sync import open_durable_tracker
from workflows.tracking.tracker import PARAMS, NullTracker, Tracker
from workflows.training import preemption
from workflows.training.async_samples import SnapshotWriter
from workflows.training.checkpointing import (
    CheckpointSaveError,
    CheckpointWriter,
    latest_intact_checkpoint,
    load_training_state,
)
from workflows.training.collapse_alarms import HistoryUseMonitor
from workflows.training.dataset_check import DatasetChangedError, dataset_record, describe_changed_clips
from workflows.training.engines.base import NonFiniteError
from workflows.training.heartbeat import HEARTBEAT_DIR, Heartbeat
from workflows.training.loop import (
    MetricsWriteError,
    TrainingInterrupted,
    TrainingLoop,
    evaluate_held_out,
)
from workflows.training.memory_check import InsufficientMemoryError, require_training_memory_on_all_ranks
from workflows.training.networks import build_initial_network, build_training_networks
from workflows.training.objectives import build_objective, schedule_values, validation_objective
from workflows.training.preemption import PreemptionMonitor
from workflows.training.progress import Progress
from workflows.training.run_log import RunLogHandler, redirect_logs
from workflows.training.sample_callback import SampleCallback
from workflows.training.samples import SampleEvaluator
from workflows.utils import distributed
from workflows.utils.json_io import read_json, write_json

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that a rank needs to train a run."""

    config: RunConfig
    metadata: ExportMetadata
    data: str  # URI of the dataset
    dataset: Mapping[str, Any]  # its record when the run began, see ``dataset_check``
    parents: dict[Stage, Path]
    run_dir: Path
    tracking_uri: str
    token: str  # of the run's lease; ranks of a dead driver find another token and write nothing


def run_worker(
    job: TrainingJob, preemption_reason: Callable[[], str] = lambda: "", snapshots: SnapshotWriter | None = None
) -> None:
    """Train to the end of the stage, from the latest complete checkpoint if there is one.

    Rank 0 writes ``outcome.json``: the final progress, a stop request, or an error that a retry would repeat.

    Args:
        job: The run.
        preemption_reason: Returns a message when a machine is about to be preempted, else "".
        snapshots: Writer of weights for asynchronous samples; None: rank 0 generates samples inline.

    Raises:
        TrainingInterrupted: After preemption. The checkpoint is written, and the launcher restarts the run.
    """
    with redirect_logs(RunLogHandler(job.run_dir) if distributed.get_rank() == 0 else logging.NullHandler()):
        _run_worker(job, preemption_reason, snapshots)


def _run_worker(job: TrainingJob, preemption_reason: Callable[[], str], snapshots: SnapshotWriter | None) -> None:
    preemption.install_sigterm_handler()
    tracker = _tracker(job)
    heartbeat = Heartbeat(job.run_dir / HEARTBEAT_DIR, distributed.get_rank())
    try:
        monitor = PreemptionMonitor(job.run_dir, job.token, preemption_reason)
        progress = _train(job, tracker=tracker, heartbeat=heartbeat, stop_reason=monitor, snapshots=snapshots)
    except (NonFiniteError, InsufficientMemoryError, CompilerNotFoundError, DatasetChangedError) as error:
        _finish(job, tracker, {"error": str(error)})
    except (CheckpointSaveError, MetricsWriteError) as error:
        if not distributed.broadcast_from_rank_zero(_owns_run(job)):
            raise  # the outcome belongs to the driver that took over
        _finish(job, tracker, {"error": str(error)})
    except TrainingInterrupted as error:
        if any(distributed.all_gather_object(preemption_reason())):
            raise
        _finish(job, tracker, {"stopped": str(error)})
    else:
        _finish(job, tracker, {"progress": serialization.to_dict(progress)})
    finally:
        heartbeat.close()
        if snapshots is not None:
            snapshots.close()


def _train(
    job: TrainingJob,
    *,
    tracker: Tracker,
    heartbeat: Heartbeat,
    stop_reason: Callable[[], str],
    snapshots: SnapshotWriter | None,
) -> Progress:
    config, device = job.config, distributed.local_device()
    train, held_out, collator = _splits(job)
    require_training_memory_on_all_ranks(config)
    networks = build_training_networks(config, build_initial_network(config, job.parents).to(device))
    engines, ema = networks.engines, networks.ema
    start = Progress(step=0, samples_seen=0, first={}, last={})
    store = CheckpointStore(checkpoint_root(job.run_dir, config.checkpoint.to))
    if saved := latest_intact_checkpoint(store):
        start = load_training_state(store, saved, engines, ema)
        _LOGGER.info(f"{config.stage} resumes at step {start.step} on {distributed.get_world_size()} workers")
    sequence = config.engine.sequence
    shard = RankShard(
        rank=distributed.get_rank() // sequence,
        world=distributed.get_world_size() // sequence,
        unit=config.rows_per_cycle,
    )
    batches = TrainingBatchLoader(train, collator, config.data, seed=config.seed, shard=shard)
    row_shard = replace(shard, unit=1)
    validation = validation_batches(held_out, collator, config.data, seed=config.seed, shard=row_shard)
    validation = [b.to(device) for b in validation]
    objective = validation_objective(config)
    saver = CheckpointWriter(
        store,
        engines=engines,
        ema=ema,
        metadata=job.metadata,
        record=lambda progress: _checkpoint_record(job, tracker, progress),
        keep=config.checkpoint.keep,
        may_write=lambda: _owns_run(job),
    )
    with closing(saver):
        loop = TrainingLoop(
            config=config,
            engines=engines,
            optims=networks.optims,
            ema=ema,
            objective=build_objective(config),
            evaluate=lambda models: evaluate_held_out(objective, validation, config.seed, models),
            tracker=tracker,
            saver=saver,
            stop_reason=stop_reason,
            clip_ids=batches.clip_ids,
            heartbeat=heartbeat,
            on_step_end=_sample_callback(
                job, ema, tracker=tracker, heartbeat=heartbeat, validation=validation, snapshots=snapshots
            ),
            record_non_finite=networks.record_non_finite,
        )
        return loop.run(
            start,
            prefetch(
                ([b.to(device) for b in batches.micro_batches(step)] for step in range(start.step, config.steps)),
                lambda _: 1,
                config.data.prefetch,
            ),
        )


def _sample_callback(
    job: TrainingJob,
    ema: Ema,
    *,
    tracker: Tracker,
    heartbeat: Heartbeat,
    validation: list[AVBatch],
    snapshots: SnapshotWriter | None,
) -> SampleCallback:
    if job.config.sample_every:
        kind = "GPU" if job.config.engine.use_gpu else "CPU"
        _LOGGER.info(
            "samples are generated asynchronously, on free resources"
            if snapshots
            else f"samples are generated inline by rank 0 while the other ranks wait: no spare {kind}"
        )
    evaluator = SampleEvaluator(job.run_dir, job.data, job.config)
    history_use = HistoryUseMonitor(job.run_dir, validation, job.config.objective.time, job.config.seed)
    trains_on_rollouts = job.config.stage == "mutual"  # other stages train on real history only
    return SampleCallback(
        job.run_dir,
        config=job.config,
        metadata=job.metadata,
        ema=ema,
        evaluator=evaluator,
        tracker=tracker,
        heartbeat=heartbeat,
        history_use=history_use if trains_on_rollouts else None,
        snapshots=snapshots,
    )


def _splits(job: TrainingJob) -> tuple[ClipSplit, ClipSplit, BatchCollator]:
    train, held_out = _open_dataset(job).split(job.config.data.held_out)
    collator = BatchCollator(timeline=job.metadata.timeline, stats=job.metadata.stats)
    return clip_split(train), clip_split(held_out), collator


def _open_dataset(job: TrainingJob) -> ClipDataset:
    """Return the dataset. Raise DatasetChangedError, on all ranks, if it is not that of the start of the run."""
    dataset, problem = None, None
    try:
        dataset = open_dataset(job.data, STAGES[job.config.stage].modalities)
        problem = describe_changed_clips(job.data, job.dataset, dataset_record(dataset), since="the run began")
    except UserInputError as error:  # unfinished: it is being extended
        problem = str(error)
    problems = [text for text in distributed.all_gather_object(problem) if text]
    if dataset is None or problems:
        raise DatasetChangedError(problems[0])
    return dataset


def _checkpoint_record(job: TrainingJob, tracker: Tracker, progress: Progress) -> dict[str, Any]:
    """Return ``run.json`` of a checkpoint without the progress: the run's record and the values of its schedules."""
    schedule = schedule_values(job.config, progress.step)
    return read_json(job.run_dir / RUN_FILE) | {
        "mlflow_run": tracker.run_id,
        "workers": distributed.get_world_size(),
        **schedule,
    }


def _owns_run(job: TrainingJob) -> bool:
    try:
        verify_lease(Store(str(job.run_dir)), job.token)
    except LeaseLostError:
        return False
    return True


def _tracker(job: TrainingJob) -> Tracker:
    """Return the tracker of rank 0, which continues an existing log; other ranks log nothing."""
    if distributed.get_rank() != 0:
        return NullTracker()
    tracker = open_training_tracker(job.config, job.data, job.run_dir, job.tracking_uri)
    if not (job.run_dir / PARAMS).exists():
        tracker.artifact(job.run_dir / RUN_FILE, "configuration")
        tracker.params(serialization.flatten(serialization.to_dict(job.config)))
    return tracker


def open_training_tracker(config: RunConfig, data: str, run_dir: Path, uri: str) -> Tracker:
    """Return the tracker that logs to ``run_dir`` and synchronizes to MLflow."""
    tags = {"stage": config.stage, "run_dir": str(run_dir), "dataset": data}
    return open_durable_tracker(run_dir, uri=uri, experiment="train", tags=tags)


def _finish(job: TrainingJob, tracker: Tracker, outcome: dict[str, Any]) -> None:
    tracker.finish(failed="error" in outcome)
    if distributed.get_rank() == 0:
        with suppress(OSError):  # Ray Train would restart the workers; the driver raises without an outcome
            write_json(job.run_dir / OUTCOME_FILE, {**outcome, "token": job.token, "mlflow_run": tracker.run_id})
    distributed.barrier()
