"""Sweep step counts, modes and guidance of checkpoints on held-out clips (``mfctl evaluate``).

FOLDER/results.json   one row per (checkpoint, mode, steps, guidance, seed, window), and rows of real clips
FOLDER/table.csv      one row per metric: mean and spread over seeds, clips, failed clips, interval
FOLDER/report.html    self-contained report
FOLDER/rows/          one file per finished setting
FOLDER/unfinished/    batches of unfinished settings
FOLDER/samples/       two clips per setting, and decoded real clips
FOLDER/*.png          plots and contact sheet
FOLDER/mlflow.json    MLflow run ids
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from mfcore.metrics.windows import DEFAULT_WINDOWS, TimeWindow, parse_windows
from workflows.checkpoints.load import find_export, load_metadata
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.packaged import model_card, packaged_folder
from workflows.config.run import DEFAULT_HELD_OUT_SHARE
from workflows.evaluation import csv_report, html_report, mlflow_report
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.contamination import TrainTestOverlap, find_train_test_overlap, overlap_warnings
from workflows.evaluation.executors import SweepExecutor, open_executor
from workflows.evaluation.feature_models import FeatureModels, parse_feature_models
from workflows.evaluation.held_out import EvaluationSet, check_compatibility, frame_rate_of, select_evaluation_set
from workflows.evaluation.metrics.generic import MetricValue, Numbers, ReferenceFeatures, sync_offsets
from workflows.evaluation.metrics.registry import compute_metrics_by_window
from workflows.evaluation.results import ResultStore, prepare_output_dir
from workflows.evaluation.rows import MetricDetail, SettingColumns, SettingResult, SweepMetadata, SweepRow
from workflows.evaluation.sampling import group_prompts
from workflows.evaluation.signals import decode_real_clips
from workflows.evaluation.sweep import (
    METRICS_VERSION,
    EvaluatedCheckpoint,
    SweepPoint,
    deduplicate_labels,
    identify_checkpoint,
    plan_sweep,
)
from workflows.evaluation.worker import MAX_SAVED_SAMPLES, EvaluationWorker, SampleTask, TaskResult
from workflows.inference.precision import Precision
from workflows.utils import environment
from workflows.utils.json_io import read_json
from workflows.utils.progress import ProgressCallback, progress_bar


def evaluate_checkpoints(
    checkpoints: Sequence[str],
    *,
    data: str | None = None,
    steps: Sequence[int] = (1, 2, 4, 8, 16, 50),
    modes: Sequence[str] = ("few", "multi"),
    guidance: Sequence[float] = (),
    samplers: Sequence[str] = (),
    clips: int = 16,
    seconds: float | None = None,
    out: str | None = None,
    seeds: Sequence[int] = (0,),
    windows: str = DEFAULT_WINDOWS,
    workers: int = 1,
    weights: Sequence[str] = (),
    precision: Precision = "fp32",
    mlflow_uri: str | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Sample, score, plot and log a sweep. A repeated call computes only missing results.

    Args:
        checkpoints: Runs, checkpoints or export folders.
        data: Dataset; default: the held-out share of the training set of the first checkpoint.
        steps: Solver steps per chunk.
        modes: "few", "multi".
        guidance: Weights of the multi-step mode; empty: the default.
        samplers: Samplers of the few-step mode; empty: the default.
        clips: Held-out clips per setting.
        seconds: Length of the samples; default: that of each clip. Longer samples repeat the transcript.
        out: Output folder; default: below the run of the first checkpoint.
        seeds: Seeds of the noise.
        windows: Parts of the clips, in seconds, that are scored separately.
        workers: Ray actors, each with one network; 1: this process.
        weights: Feature models as ``kind=path``.
        precision: Precision of weights and products.
        mlflow_uri: Tracking store; default: that of the environment.
        progress: Called with the number of finished and of all tasks.

    Raises:
        ValueError: A checkpoint or the dataset is missing or incompatible, or no setting is valid. Nothing is written.
    """
    evaluated = deduplicate_labels(
        [identify_checkpoint(path, precision=precision) for path in dict.fromkeys(checkpoints)]
    )
    points, skipped = plan_sweep(evaluated, modes=modes, steps=steps, guidance=guidance, samplers=samplers, seeds=seeds)
    time_windows, feature_models = parse_windows(windows), parse_feature_models(weights)
    feature_models.load_all()
    uri = data or _training_dataset(evaluated[0])
    evaluation_set = select_evaluation_set(
        uri, clips=clips, seconds=seconds, fraction=_common_held_out_fraction(evaluated, uri)
    )
    metadata = {checkpoint: load_metadata(checkpoint.source) for checkpoint in evaluated}
    for checkpoint, export_metadata in metadata.items():
        check_compatibility(export_metadata, evaluation_set.meta, path=checkpoint.path, uri=uri)
    overlaps = _overlaps(evaluated, evaluation_set, uri)
    step_warnings = _step_count_warnings(points, metadata)
    for line in [*overlap_warnings(overlaps), *step_warnings]:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    scope = hashlib.sha256(
        f"{METRICS_VERSION} {windows} {evaluation_set.digest()} {feature_models.id}".encode()
    ).hexdigest()[:12]
    name = "+".join(dict.fromkeys(s.label for s in evaluated)) + f"-{scope[:6]}"
    folder = Path(out) if out else Path(environment.resolve_path("runs/evaluate")) / name
    prepare_output_dir(folder)
    sweep = _Sweep(
        evaluation_set=evaluation_set,
        windows=time_windows,
        store=ResultStore(folder, scope),
        evaluated=evaluated,
        feature_models=feature_models,
    )
    with progress_bar("evaluate") as bar:
        sweep.run(points, progress or bar, workers)
    source = "of the same" if evaluation_set.own_reference else "other"
    facts: SweepMetadata = {
        "dataset": uri,
        "clips": len(evaluation_set.prompts),
        "scope": scope,
        "skipped": skipped,
        "doubts": step_warnings,
        "repeated": evaluation_set.repeated,
        "reference": f"{len(evaluation_set.reference)} {source} clips",
        "overlap": {label: overlap.summary for label, overlap in overlaps.items()},
        "weights": list(weights),
    }
    return sweep.finish(name, mlflow_uri or environment.tracking_uri(), facts)


def _overlaps(
    evaluated: Sequence[EvaluatedCheckpoint], evaluation_set: EvaluationSet, uri: str
) -> dict[str, TrainTestOverlap]:
    """Return the overlap of the held-out clips with the training clips of each checkpoint, by label."""
    return {
        s.label: find_train_test_overlap(evaluation_set, uri, _read_run_record(s).get("data"), _held_out_fraction(s))
        for s in evaluated
    }


def _step_count_warnings(
    points: Sequence[SweepPoint], metadata: Mapping[EvaluatedCheckpoint, ExportMetadata]
) -> list[str]:
    """Return warnings for step counts that the few-step mode is not trained for."""
    found = [
        (s.checkpoint.label, metadata[s.checkpoint].step_count_warning(s.params.mode, s.params.steps)) for s in points
    ]
    return list(dict.fromkeys(f"{label}: {warning}" for label, warning in found if warning))


def _read_run_record(checkpoint: EvaluatedCheckpoint) -> Mapping[str, Any]:
    """Return ``run.json`` of a checkpoint; empty for an export without it."""
    path = find_export(checkpoint.source).parent / "run.json"
    return read_json(path) if path.exists() else {}


def _training_dataset(checkpoint: EvaluatedCheckpoint) -> str:
    uri = _read_run_record(checkpoint).get("data")
    if not uri:
        hint = ""
        if packaged_folder(checkpoint.path) and (facts := model_card(checkpoint.path).evaluation):
            hint = f" Held-out clips: {' && '.join(facts.commands)}"
        raise UserInputError(f"{checkpoint.path} does not record its dataset. Use --data DATASET.{hint}")
    return str(uri)


def _held_out_fraction(checkpoint: EvaluatedCheckpoint) -> float:
    """Return the held-out share of the training; smaller shares are subsets of it."""
    return float(_read_run_record(checkpoint).get("config", {}).get("data", {}).get("held_out", DEFAULT_HELD_OUT_SHARE))


def _common_held_out_fraction(evaluated: Sequence[EvaluatedCheckpoint], uri: str) -> float | None:
    """Return the share that all trainings on ``uri`` held out; None without such a training."""
    return min((_held_out_fraction(s) for s in evaluated if _read_run_record(s).get("data") == uri), default=None)


@dataclass(kw_only=True)
class _Sweep:
    """State of a running sweep."""

    evaluation_set: EvaluationSet
    windows: tuple[TimeWindow, ...]
    store: ResultStore
    evaluated: Sequence[EvaluatedCheckpoint]
    feature_models: FeatureModels
    times: dict[str, float] = field(default_factory=dict[str, float])  # seconds per phase
    reference: ReferenceFeatures = field(init=False)  # set if tasks are pending

    @cached_property
    def worker(self) -> EvaluationWorker:
        return EvaluationWorker(self.evaluation_set, self.feature_models)

    def run(self, points: Sequence[SweepPoint], progress: ProgressCallback, workers: int) -> None:
        """Run the points without stored results."""
        pending = [s for s in points if not self.store.is_finished(self._key(s))]
        if not pending:
            progress(0, 0)
            return
        with open_executor(self.worker, workers) as executor:
            with self._timed("real"):
                self.reference = executor.extract_real_features()
            if not self.store.is_finished(f"real-{self.store.scope}"):
                self._score_real_clips()
            self._run(pending, executor, progress, workers)

    def _run(
        self, pending: Sequence[SweepPoint], executor: SweepExecutor, progress: ProgressCallback, workers: int
    ) -> None:
        tasks: list[SampleTask] = []
        finished_batches: dict[str, dict[int, TaskResult]] = {}
        for point in pending:
            of_point = self._tasks(point)
            stored = {task.batch: self.store.load_batch(self._key(point), task.batch) for task in of_point}
            finished = {batch: result for batch, result in stored.items() if result is not None}
            finished_batches[self._key(point)] = finished
            tasks += [task for task in of_point if task.batch not in finished]
            if len(finished) == len(of_point):  # interrupted before its rows were stored
                self._finish_point(point, finished, workers)
        progress(0, len(tasks))
        with self._timed("samples"):
            for done, (task, task_result) in enumerate(executor.map(tasks), start=1):
                key = self._key(task.point)
                finished = finished_batches[key]
                finished[task.batch] = task_result
                if len(finished) == len(self._tasks(task.point)):
                    self._finish_point(task.point, finished, workers)
                else:
                    self.store.save_batch(key, task.batch, task_result)
                progress(done, len(tasks))

    def _key(self, point: SweepPoint) -> str:
        return point.key(self.store.scope)

    def _tasks(self, point: SweepPoint) -> list[SampleTask]:
        index = {prompt.number: i for i, prompt in enumerate(self.evaluation_set.prompts)}
        return [
            SampleTask(point=point, batch=i, prompts=tuple(index[p.number] for p in batch))
            for i, batch in enumerate(group_prompts(self.evaluation_set.prompts))
        ]

    def _score_real_clips(self) -> None:
        columns: SettingColumns = {
            "checkpoint": "real",
            "mode": "real",
            "steps": 0,
            "nfe": 0,
            "guidance": 1.0,
            "seed": 0,
            "label": "real",
        }
        lengths = [float(p.clip.chunks * self.evaluation_set.meta.chunk_seconds) for p in self.evaluation_set.prompts]
        rows = self._rows(columns, self.reference.prompts, lengths)
        signals = decode_real_clips(
            self.evaluation_set, [p.clip for p in self.evaluation_set.prompts[:MAX_SAVED_SAMPLES]]
        )
        name = f"real-{self.store.scope[:6]}"
        samples = self._write_samples(name, {i: self.worker.encode_mp4(s) for i, s in enumerate(signals)})
        result = SettingResult(digest="real", name="real", rows=rows, samples=samples)
        self.store.save_finished(f"real-{self.store.scope}", result)

    def _finish_point(self, point: SweepPoint, finished: Mapping[int, TaskResult], workers: int) -> None:
        """Score a setting with all batches and store its rows."""
        features: dict[int, ClipFeatures] = {}
        lengths: dict[int, float] = {}
        clips: dict[int, bytes] = {}
        for batch in finished.values():
            features |= dict(zip(batch.prompts, batch.features, strict=True))
            lengths |= dict.fromkeys(batch.prompts, batch.length)
            clips |= batch.samples
        prompts = sorted(features)
        with self._timed("score"):
            rows = self._rows(point.columns(workers), [features[p] for p in prompts], [lengths[p] for p in prompts])
        rows[0]["metrics"] |= finished[0].setting_metrics | _batch_speed(list(finished.values()))
        name = f"{point.name}-{self._key(point)[:6]}"  # unique per clips and weights
        samples = self._write_samples(name, clips)
        result = SettingResult(digest=point.checkpoint.digest, name=point.name, rows=rows, samples=samples)
        self.store.save_finished(self._key(point), result)

    def _rows(
        self, columns: SettingColumns, features: Sequence[ClipFeatures], lengths: Sequence[float]
    ) -> list[SweepRow]:
        """Return a row for the whole clips, then one for each window that clips reach into."""
        rows: list[SweepRow] = []
        for window in compute_metrics_by_window(features, lengths, self.windows, self.reference):
            row: SweepRow = {
                **columns,
                "window": window.window,
                "clips": len(window.clips),
                "metrics": window.scores.metrics,
                "detail": {name: _detail(score) for name, score in window.scores.found.items()},
                "failures": window.scores.failures,
                "not_measured": window.scores.not_measured,
            }
            if window.window == "all":
                row["offsets"] = sync_offsets(window.clips)
            rows.append(row)
        return rows

    def _write_samples(self, name: str, clips: Mapping[int, bytes]) -> list[str]:
        """Write samples in the order of prompts and return their paths below the folder of the sweep."""
        with self._timed("files"):
            folder = self.store.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"{name}-{i}.mp4" for i in range(len(clips))]
            for path, prompt in zip(paths, sorted(clips), strict=True):
                path.write_bytes(clips[prompt])
            return [f"samples/{path.name}" for path in paths]

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[kind] = self.times.get(kind, 0.0) + time.perf_counter() - start

    def finish(self, name: str, mlflow_uri: str, facts: SweepMetadata) -> dict[str, Any]:
        """Write summary, plots, report and MLflow runs from all stored results; return the facts of the sweep."""
        results = self.store.load_all(self.evaluated)
        rows = self.store.write_summary(results)
        with self._timed("plots"):
            fps, rate = frame_rate_of(self.evaluation_set.meta), self.worker.reader.sample_rate
            plots = mlflow_report.draw_plots(results, self.store.folder, fps=fps, sample_rate=rate, title=name)
            metric_rows = csv_report.to_rows(rows)
            files = [csv_report.write_csv(metric_rows, self.store.folder / "table.csv")]
            report = html_report.write_html_report(
                self.store.folder, name, facts=facts, results=results, metric_rows=metric_rows, plots=plots
            )
            files.append(report)
        with self._timed("tracking"):
            parent = mlflow_report.log_sweep_to_mlflow(
                results, [*plots, *files], self.store, uri=mlflow_uri, name=name, facts=facts
            )
        return {
            "results": str(self.store.path),
            "table": str(files[0]),
            "report": str(files[1]),
            "mlflow_parent_run": parent,
            "plots": [str(path) for path in plots],
            "samples": [str(self.store.folder / path) for result in results for path in result["samples"]],
            "clips": facts["clips"],
            "rows": len(rows),
            "not_measured": {k: v for row in rows if row["window"] == "all" for k, v in row["not_measured"].items()},
            "skipped": facts["skipped"],
            "overlap": facts["overlap"],
            **({"note": "samples are longer than their clips, so transcripts repeat"} if facts["repeated"] else {}),
            "seconds": {kind: round(spent, 2) for kind, spent in self.times.items()},
        }


def _detail(value: MetricValue) -> MetricDetail:
    if value.low is None or value.high is None:
        return {"count": value.count, "failed": value.failed}
    return {"count": value.count, "failed": value.failed, "low": value.low, "high": value.high}


def _batch_speed(task_results: Sequence[TaskResult]) -> Numbers:
    """Return the clip seconds per second of computation with many parallel streams."""
    sampled = sum(o.length * len(o.prompts) for o in task_results)
    return {
        "batch_seconds_per_second": sampled / sum(o.seconds for o in task_results),
        "batch_rows": float(max(len(o.prompts) for o in task_results)),
    }
