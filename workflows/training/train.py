"""``mfctl train``: resolve the configuration, validate it and launch the run on Ray Train.

All checks run before the first file is written. A run is a folder:

    run.json      record: stage, resolved configuration, dataset, parents, versions
    metrics.jsonl, params.json, artifacts.jsonl, mlflow.json   see ``workflows.tracking.mlflow_sync``
    samples/, looks/, alarms.json   generated clips, sample reports, active alarms
    checkpoints/  see ``workflows.checkpoints.store``; elsewhere with the setting checkpoint.to
    ranks/        heartbeats of the workers
    log.txt, log.jsonl   see ``workflows.training.run_log``
    outcome.json  written last: the final progress, or why the run stopped
"""

import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.io.lease import Lease
from preprocessing.io.storage import Store
from workflows.checkpoints.layout import OUTCOME_FILE, RUN_FILE
from workflows.checkpoints.load import verify_export, weight_files
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import CheckpointStore, checkpoint_root, join_uri, samples_of
from workflows.config import serialization
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES, headline_loss
from workflows.tracking.mlflow_sync import has_backlog
from workflows.training import cost_estimate
from workflows.training.async_samples import evaluate_remaining, unevaluated_snapshots
from workflows.training.collapse_alarms import AlarmStore, active_alarms
from workflows.training.dataset_check import dataset_record, describe_changed_clips
from workflows.training.heartbeat import HEARTBEAT_DIR, monitor_heartbeats
from workflows.training.loop import TrainingInterrupted
from workflows.training.pretrained_init import describe_wan_import
from workflows.training.progress import Progress
from workflows.training.ray_launcher import run_on_ray, run_with_gpu
from workflows.training.resolve import (
    ResolvedRun,
    final_progress,
    immutable_settings,
    latest_checkpoint_record,
    make_export_metadata,
    resolve_run,
    transcript_kind,
    world_of,
)
from workflows.training.run_log import RunLogHandler, redirect_logs, show_run_log
from workflows.training.sample_callback import SampleReportPublisher
from workflows.training.samples import report_path
from workflows.training.worker import TrainingJob, open_training_tracker
from workflows.utils import environment
from workflows.utils.json_io import read_intact_json, read_json, write_json

_LOGGER = logging.getLogger(__name__)
SMALL_FILES = 1 << 16  # bytes that the log and the outcome of a run need
LaunchFn = Callable[[TrainingJob], None]
"""Runs ``workflows.training.worker.run_worker`` on all ranks and returns when they have finished."""
SampleFn = Callable[[Path], list[Path]]
"""Generates the sample files of a finished run directory, unless they exist."""


def train_stage(
    stage: Stage,
    *,
    data: str | None = None,
    init_from: Sequence[str] = (),
    preset: str = "tiny",
    sets: Sequence[str] = (),
    config_file: str | None = None,
    run: str | None = None,
    runs_dir: str | Path = "runs",
    dry_run: bool = False,
    launch: LaunchFn | None = None,
    sample: SampleFn | None = None,
) -> dict[str, Any]:
    """Train one stage and return its result; the same call again resumes an unfinished run.

    Args:
        stage: Stage to train.
        data: Dataset; None: the latest one.
        init_from: Parent runs; empty: the latest ones.
        preset: Size of the configuration.
        sets: Settings ``KEY=VALUE``.
        config_file: File with further settings.
        run: Name of the run; None: derived from the configuration.
        runs_dir: Folder of the runs.
        dry_run: Return the configuration and its costs only.
        launch: Launcher of the ranks; None: Ray Train.
        sample: Called with the run directory after the training.

    Raises:
        ValueError: Invalid request; no file is written.
        RuntimeError: The training failed or was interrupted.
    """
    if stage not in STAGES:
        raise UserInputError(f"unknown stage {stage!r}. Choose one of {', '.join(STAGES)}")
    runs = Path(environment.resolve_path(str(runs_dir)))
    try:
        request = resolve_run(
            stage,
            data=data,
            init_from=init_from,
            preset=preset,
            sets=sets,
            config_file=config_file,
            run=run,
            runs=runs,
            count_only=dry_run,
        )
    except UserInputError as missing:
        if dry_run and not data and not init_from:
            return cost_estimate.estimate_without_dataset(stage, preset, sets, config_file) | {"missing": str(missing)}
        raise
    metadata = _export_metadata(request)
    if dry_run:
        costs = cost_estimate.estimate_costs(request.config, metadata.timeline)
        return {**request.record(), "run_dir": str(request.run_dir), "costs": costs} | describe_wan_import(
            request.config
        )
    return _train(request, metadata, launch=launch, sample=sample, uri=environment.tracking_uri(runs))


def _export_metadata(request: ResolvedRun) -> ExportMetadata:
    metadata = make_export_metadata(request.config, request.dataset.meta, request.parents)
    return replace(metadata, transcript=transcript_kind(request.dataset), world=world_of(request.dataset))


def _train(
    request: ResolvedRun, metadata: ExportMetadata, *, launch: LaunchFn | None, sample: SampleFn | None, uri: str
) -> dict[str, Any]:
    """Train the resolved run, unless it is finished, and return its result. ``uri``: MLflow."""
    if launch is None:
        _check_gpu(request)
    with redirect_logs(logging.StreamHandler()):
        if start := describe_wan_import(request.config):
            _LOGGER.info(start["init_video"])
        _check_record(request)
        if final_progress(request.run_dir) is None:
            for export in request.parents.values():
                verify_export(export, weight_files(export, "ema"))
        with _lease(request.run_dir) as lease, _checkpoint_lease(request):
            if final_progress(request.run_dir) is None:
                _check_checkpoint(request)
                _write_record(request)
                job = TrainingJob(
                    config=request.config,
                    metadata=metadata,
                    data=request.data,
                    dataset=dataset_record(request.dataset),
                    parents=request.parents,
                    run_dir=request.run_dir,
                    tracking_uri=uri,
                    token=lease.token,
                )
                _launch(job, launch or run_on_ray)
            _conclude(request, sample, uri, on_ray=launch is None)
    return _result(request)


def _check_gpu(request: ResolvedRun) -> None:
    """Raise UserInputError if the run needs GPUs that a Ray of this machine alone can never have."""
    if not request.config.engine.use_gpu or "RAY_ADDRESS" in os.environ or final_progress(request.run_dir) is not None:
        return
    import torch

    if not torch.cuda.is_available():
        raise UserInputError(
            "engine.use_gpu=true: this machine has no CUDA device. Set engine.use_gpu=false, or run the command on a "
            "cluster with `mfctl submit`"
        )


def _launch(job: TrainingJob, launch: LaunchFn) -> None:
    """Run all ranks to the end; show their log and report slow ranks meanwhile. Raise the error of the outcome."""
    with (
        show_run_log(job.run_dir),
        redirect_logs(RunLogHandler(job.run_dir)),
        monitor_heartbeats(job.run_dir / HEARTBEAT_DIR),
    ):
        launch(job)
    _raise_if_failed(job.run_dir, job.token)


def _check_record(request: ResolvedRun) -> None:
    """Raise ValueError if the run exists with other settings."""
    path = request.run_dir / RUN_FILE
    existing = read_intact_json(path)
    if existing is None:
        others = [p for p in request.run_dir.glob("*") if not p.name.startswith("_lock")]
        if not path.exists() and others:
            raise UserInputError(f"{request.run_dir} exists and is not a training run. Choose another name with --run")
        return
    _require_equal_records(f"the run {request.run_dir}", existing, request.record(), request.data)


def _check_checkpoint(request: ResolvedRun) -> None:
    """Raise ValueError if the checkpoint has other settings or data. Runs may share the checkpoint root."""
    store = CheckpointStore(checkpoint_root(request.run_dir, request.config.checkpoint.to))
    name, existing = latest_checkpoint_record(store)
    if existing:
        record = {key: request.record()[key] for key in ("stage", "config", "dataset")}  # paths may differ
        _require_equal_records(f"the checkpoint {store.uri_of(name)}", existing, record, request.data)


def _require_equal_records(what: str, existing: Mapping[str, Any], record: Mapping[str, Any], data: str) -> None:
    """Raise UserInputError if two records differ in a setting that is fixed on resume, or in the clips of ``data``."""
    existing = {key: value for key, value in existing.items() if key in record}
    if isinstance(existing.get("config"), Mapping):
        existing["config"] = serialization.fill_defaults(RunConfig, existing["config"])
    before, now = immutable_settings(existing), immutable_settings(record)
    if "dataset.digest" not in before:  # written by an earlier version
        now.pop("dataset.digest", None)
    lines = serialization.diff(before, now)
    if lines and all(line.startswith(("dataset.clips:", "dataset.digest:")) for line in lines):
        raise UserInputError(
            describe_changed_clips(data, existing["dataset"], record["dataset"], since=f"{what} was written")
        )
    if lines:
        more = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        raise UserInputError(
            f"{what} has other settings: {'; '.join(lines[:4])}{more}. "
            "Use these settings to resume it, or another --run name for a new run"
        )


def _lease(run_dir: Path) -> Lease:
    return Lease(Store(str(run_dir)))


def _checkpoint_lease(request: ResolvedRun) -> AbstractContextManager[object]:
    """Return the lease of a separate checkpoint folder: machines may share it without the runs folder."""
    to = request.config.checkpoint.to
    place = join_uri(to, request.run_dir.name) if to else request.run_dir
    return nullcontext() if place == request.run_dir else Lease(Store(str(place)))


def _write_record(request: ResolvedRun) -> None:
    """Write the record of the run and delete the outcome of a failed attempt."""
    names = ("torch", "deepspeed", "ray", "mlflow", "mutual-forcing")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in names}
    write_json(request.run_dir / RUN_FILE, {**request.record(), "versions": versions})
    (request.run_dir / OUTCOME_FILE).unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _raise_if_failed(run_dir: Path, token: str) -> None:
    """Raise the error of the outcome of this driver's workers."""
    outcome = read_intact_json(run_dir / OUTCOME_FILE) or {}
    if outcome.get("token") != token:
        if shutil.disk_usage(run_dir).free < SMALL_FILES:
            raise RuntimeError(
                f"the disk of {run_dir} is full: the workers could not write the outcome of the run. Free space, then "
                "run the same command to resume from the last checkpoint"
            )
        raise RuntimeError(f"the workers of {run_dir} ended without an outcome. See their log above")
    if "error" in outcome:
        raise RuntimeError(outcome["error"])
    if "stopped" in outcome:
        raise TrainingInterrupted(outcome["stopped"])


def _conclude(request: ResolvedRun, sample: SampleFn | None, uri: str, *, on_ray: bool) -> None:
    """Generate the samples once per run; at each call, publish what the log or MLflow lacks, and the alarms."""
    run_dir, engine = request.run_dir, request.config.engine
    outcome = read_json(run_dir / OUTCOME_FILE)

    def run_on_device(work: Callable[[Path], Any], *, is_done: bool) -> Any:
        return run_with_gpu(work, run_dir, engine) if on_ray and not is_done else work(run_dir)

    run_on_device(evaluate_remaining, is_done=not unevaluated_snapshots(run_dir))
    if sample is not None and "samples" not in outcome:
        paths = run_on_device(sample, is_done=report_path(run_dir, outcome["progress"]["step"]).exists())
        outcome["samples"] = [str(path) for path in paths]
    publisher = SampleReportPublisher(run_dir, AlarmStore(run_dir))
    if (reports := publisher.pending()) or has_backlog(run_dir, uri):
        tracker = open_training_tracker(request.config, request.data, run_dir, uri)
        publisher.publish(reports, tracker)
        tracker.finish()
        outcome["mlflow_run"] = tracker.run_id
    outcome["alarms"] = active_alarms(run_dir)
    write_json(run_dir / OUTCOME_FILE, outcome)
    if outcome["alarms"]:
        _LOGGER.warning(f"ALARM active at the end of {run_dir}: {'; '.join(outcome['alarms'])}. Check its samples")


def _final_checkpoint(store: CheckpointStore, progress: Progress) -> str:
    """Return the checkpoint of the last step, else the latest one; a damaged one may have more samples."""
    complete = store.list_complete()
    return next((name for name in complete if samples_of(name) == progress.samples_seen), complete[-1])


def _result(request: ResolvedRun) -> dict[str, Any]:
    """Return the content of ``--json``."""
    outcome = read_json(request.run_dir / OUTCOME_FILE)
    store = CheckpointStore(checkpoint_root(request.run_dir, request.config.checkpoint.to))
    progress = serialization.from_dict(Progress, outcome["progress"])
    plan = STAGES[request.config.stage]
    return {
        "run_dir": str(request.run_dir),
        "stage": request.config.stage,
        "samples_seen": progress.samples_seen,
        "losses": {
            "first": headline_loss(plan, progress.first),
            "last": headline_loss(plan, progress.last),
            "held_out_first": progress.first,
            "held_out_last": progress.last,
        },
        "checkpoint": store.uri_of(_final_checkpoint(store, progress)),
        "mlflow_run": outcome["mlflow_run"],
        "samples": outcome.get("samples", []),
        "alarms": outcome.get("alarms", []),
    }
