"""``mfctl evaluate``: sweep step counts, modes and guidance of checkpoints on held-out clips.

FOLDER/results.json   one row per (checkpoint, mode, steps, guidance, seed, window); "real" rows are the ceiling
FOLDER/table.csv      one line per number: value, spread over seeds, clips, failed clips, interval; or what it needs
FOLDER/report.html    all of it on one page that needs no other file
FOLDER/rows/          one file per setting: what is there is not generated again
FOLDER/unfinished/    batches of settings that are not complete yet
FOLDER/samples/       two clips of every setting, and the real ones as the codec keeps them
FOLDER/*.png          frontier, seconds, metrics over time, comparison sheet
FOLDER/mlflow.json    the parent run
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

from mfcore.metrics.windows import DEFAULT_WINDOWS, TimeWindow, parse_windows
from workflows.checkpoints.load import find_export, load_metadata
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config.run import DEFAULT_HELD_OUT_SHARE
from workflows.evaluation import csv_report, html_report, mlflow_report
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.contamination import find_train_test_overlap, overlap_warnings
from workflows.evaluation.executors import SweepExecutor, open_executor
from workflows.evaluation.feature_models import FeatureModels, parse_feature_models
from workflows.evaluation.held_out import EvaluationSet, check_compatibility, frame_rate_of, select_evaluation_set
from workflows.evaluation.metrics.generic import MetricValue, Numbers, ReferenceFeatures, sync_offsets
from workflows.evaluation.metrics.registry import compute_metrics_by_window
from workflows.evaluation.results import ResultStore, prepare_output_dir
from workflows.evaluation.sampling import group_prompts
from workflows.evaluation.signals import decode_real_clips
from workflows.evaluation.sweep import (
    METRICS_VERSION,
    EvaluatedCheckpoint,
    Row,
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
    """Sample, score, plot and log; the same call again does only what is missing.

    ``data``: default the dataset of the first checkpoint's training, of which the share that it kept away is used; of
    another one all clips are. ``guidance``: weights of the multi-step mode.
    ``seconds``: length of the samples, default that of each clip; a longer sample repeats its clip's transcript.
    ``workers``: of Ray's, each with a network of its own; 1 works in this process. ``weights``: networks that measure,
    as kind=place. ``precision``: that of the samples; numbers of two precisions are never taken together. ValueError,
    with nothing written, when a checkpoint or the dataset is missing, they do not fit, or no setting makes sense.
    """
    subjects = deduplicate_labels(
        [identify_checkpoint(path, precision=precision) for path in dict.fromkeys(checkpoints)]
    )
    settings, skipped = plan_sweep(subjects, modes, steps, guidance, seeds)
    cut, instruments = parse_windows(windows), parse_feature_models(weights)
    instruments.load_all()
    uri = data or _trained_on(subjects[0])
    held = select_evaluation_set(uri, clips=clips, seconds=seconds, fraction=_kept_away(subjects, uri))
    cards = {subject: load_metadata(subject.path) for subject in subjects}
    for subject, card in cards.items():
        check_compatibility(card, held.meta, subject.path, uri)
    overlaps = {s.label: find_train_test_overlap(held, uri, _record(s).get("data"), _held_out(s)) for s in subjects}
    doubts = _doubts(settings, cards)
    for line in [*overlap_warnings(overlaps), *doubts]:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    scope = hashlib.sha256(f"{METRICS_VERSION} {windows} {held.digest()} {instruments.id}".encode()).hexdigest()[:12]
    name = "+".join(dict.fromkeys(s.label for s in subjects)) + f"-{scope[:6]}"
    folder = Path(out) if out else Path(environment.resolve_path("runs/evaluate")) / name
    prepare_output_dir(folder)
    sweep = _Sweep(
        held=held, windows=cut, results=ResultStore(folder, scope), subjects=subjects, instruments=instruments
    )
    with progress_bar("evaluate") as show:
        sweep.run(settings, progress or show, workers)
    facts = {
        "dataset": uri,
        "clips": len(held.prompts),
        "scope": scope,
        "skipped": skipped,
        "doubts": doubts,
        "repeated": held.repeated,
        "reference": f"{len(held.reference)} {'of the same' if held.own_reference else 'other'} clips",
        "overlap": {label: overlap.summary for label, overlap in overlaps.items()},
        "weights": list(weights),
    }
    return sweep.finish(name, mlflow_uri or environment.tracking_uri(), facts)


def _doubts(settings: Sequence[SweepPoint], cards: Mapping[EvaluatedCheckpoint, ExportMetadata]) -> list[str]:
    """A line for each checkpoint and number of steps that its training does not reach to."""
    found = [(s.subject.label, cards[s.subject].step_count_warning(s.how.mode, s.how.steps)) for s in settings]
    return list(dict.fromkeys(f"{label}: {doubt}" for label, doubt in found if doubt))


def _record(subject: EvaluatedCheckpoint) -> Mapping[str, Any]:
    """``run.json`` of the checkpoint; empty for a bare export."""
    path = find_export(subject.path).parent / "run.json"
    return read_json(path) if path.exists() else {}


def _trained_on(subject: EvaluatedCheckpoint) -> str:
    uri = _record(subject).get("data")
    if not uri:
        raise ValueError(f"{subject.path} does not say what it was trained on: name a dataset with --data DATASET")
    return str(uri)


def _held_out(subject: EvaluatedCheckpoint) -> float:
    """The share that the training kept away; a smaller share of the same sources lies inside it."""
    return float(_record(subject).get("config", {}).get("data", {}).get("held_out", DEFAULT_HELD_OUT_SHARE))


def _kept_away(subjects: Sequence[EvaluatedCheckpoint], uri: str) -> float | None:
    """The share of a dataset that every training on it kept away; None: none of them was on it, all may be used."""
    return min((_held_out(s) for s in subjects if _record(s).get("data") == uri), default=None)


@dataclass(kw_only=True)
class _Sweep:
    """A sweep at work."""

    held: EvaluationSet
    windows: tuple[TimeWindow, ...]
    results: ResultStore
    subjects: Sequence[EvaluatedCheckpoint]
    instruments: FeatureModels
    times: dict[str, float] = field(default_factory=dict[str, float])  # seconds by kind of work
    real: ReferenceFeatures = field(init=False)  # known once there is something to do

    @cached_property
    def examiner(self) -> EvaluationWorker:
        return EvaluationWorker(self.held, self.instruments)

    def run(self, settings: Sequence[SweepPoint], progress: ProgressCallback, workers: int) -> None:
        """Everything that is not there yet."""
        todo = [s for s in settings if self.results.load_finished(self._key(s)) is None]
        if not todo:
            progress(0, 0)
            return
        with open_executor(self.examiner, workers) as hands:
            with self._timed("real"):
                self.real = hands.extract_real_features()
            if self.results.load_finished(f"real-{self.results.scope}") is None:
                self._score_real()
            self._run(todo, hands, progress, workers)

    def _run(self, todo: Sequence[SweepPoint], hands: SweepExecutor, progress: ProgressCallback, workers: int) -> None:
        waiting = {self._key(s): (s, dict[int, TaskResult]()) for s in todo}
        tasks: list[SampleTask] = []
        for task in (task for s in todo for task in self._tasks(s)):
            key = self._key(task.setting)
            if (kept := self.results.load_batch(key, task.batch)) is not None:
                waiting[key][1][task.batch] = kept
            else:
                tasks.append(task)
        for key in [key for key, (s, got) in waiting.items() if len(got) == len(self._tasks(s))]:
            self._settle(*waiting.pop(key), workers)  # killed between its last batch and its rows
        progress(0, len(tasks))
        with self._timed("samples"):
            for done, (task, outcome) in enumerate(hands.map(tasks), start=1):
                key = self._key(task.setting)
                setting, got = waiting[key]
                got[task.batch] = outcome
                if len(got) == len(self._tasks(setting)):
                    self._settle(setting, got, workers)
                else:
                    self.results.save_batch(key, task.batch, outcome)
                progress(done, len(tasks))

    def _key(self, setting: SweepPoint) -> str:
        return setting.key(self.results.scope)

    def _tasks(self, setting: SweepPoint) -> list[SampleTask]:
        place = {prompt.number: i for i, prompt in enumerate(self.held.prompts)}
        return [
            SampleTask(setting=setting, batch=i, prompts=tuple(place[p.number] for p in batch))
            for i, batch in enumerate(group_prompts(self.held.prompts))
        ]

    def _score_real(self) -> None:
        facts = {"checkpoint": "real", "mode": "real", "steps": 0, "nfe": 0, "guidance": 1.0, "seed": 0}
        lengths = [float(p.clip.chunks * self.held.meta.chunk_seconds) for p in self.held.prompts]
        rows = self._rows({**facts, "label": "real"}, self.real.prompts, lengths)
        signals = decode_real_clips(self.held, [p.clip for p in self.held.prompts[:MAX_SAVED_SAMPLES]])
        name = f"real-{self.results.scope[:6]}"
        samples = self._files(name, {i: self.examiner.encode_mp4(s) for i, s in enumerate(signals)})
        part = {"digest": "real", "name": "real", "rows": rows, "samples": samples}
        self.results.save_finished(f"real-{self.results.scope}", part)

    def _settle(self, setting: SweepPoint, got: Mapping[int, TaskResult], workers: int) -> None:
        """Score a setting whose batches are all there, and store its rows."""
        by_prompt = {p: (r, o.length) for o in got.values() for p, r in zip(o.prompts, o.readings, strict=True)}
        readings, lengths = zip(*(by_prompt[p] for p in sorted(by_prompt)), strict=True)
        facts = {**setting.columns, "label": setting.subject.label, "workers": workers}
        with self._timed("score"):
            rows = self._rows(facts, readings, lengths)
        rows[0]["metrics"] |= got[0].setting_metrics | _batch_speed(list(got.values()))
        name = f"{setting.name}-{self._key(setting)[:6]}"  # other clips and other weights have files of their own
        samples = self._files(name, {p: mp4 for o in got.values() for p, mp4 in o.samples.items()})
        part = {"digest": setting.subject.digest, "name": setting.name, "rows": rows, "samples": samples}
        self.results.save_finished(self._key(setting), part)

    def _rows(self, facts: Row, readings: Sequence[ClipFeatures], lengths: Sequence[float]) -> list[Row]:
        """A row for the whole clips, then one for each window that they reach into."""
        return [
            {
                **facts,
                "window": one.window,
                "clips": len(one.part),
                "metrics": one.scores.metrics,
                "detail": {name: _detail(score) for name, score in one.scores.found.items()},
                "failures": one.scores.failures,
                "not_measured": one.scores.not_measured,
                **({"offsets": sync_offsets(one.part)} if one.window == "all" else {}),
            }
            for one in compute_metrics_by_window(readings, lengths, self.windows, self.real)
        ]

    def _files(self, name: str, clips: Mapping[int, bytes]) -> list[str]:
        """Kept samples, in the order of prompts; paths below the sweep's folder."""
        with self._timed("files"):
            folder = self.results.folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"{name}-{i}.mp4" for i in range(len(clips))]
            for path, prompt in zip(paths, sorted(clips), strict=True):
                path.write_bytes(clips[prompt])
            return [f"samples/{path.name}" for path in paths]

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.times[kind] = self.times.get(kind, 0.0) + time.perf_counter() - began

    def finish(self, name: str, mlflow_uri: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Results, plots, the page and MLflow from all that this folder holds of these checkpoints and clips."""
        parts = self.results.load_all(self.subjects)
        rows = self.results.write_summary(parts)
        with self._timed("plots"):
            fps, rate = frame_rate_of(self.held.meta), self.examiner.reader.sample_rate
            plots = mlflow_report.draw_plots(parts, self.results.folder, fps, rate, name)
            lines = csv_report.to_rows(rows)
            files = [csv_report.write_csv(lines, self.results.folder / "table.csv")]
            report = html_report.write_html_report(
                self.results.folder, name, facts=facts, parts=parts, lines=lines, plots=plots
            )
            files.append(report)
        with self._timed("tracking"):
            parent = mlflow_report.log_sweep_to_mlflow(parts, [*plots, *files], self.results, mlflow_uri, name, facts)
        return {
            "results": str(self.results.path),
            "table": str(files[0]),
            "report": str(files[1]),
            "mlflow_parent_run": parent,
            "plots": [str(path) for path in plots],
            "samples": [str(self.results.folder / path) for part in parts for path in part["samples"]],
            "clips": facts["clips"],
            "rows": len(rows),
            "not_measured": {k: v for row in rows if row["window"] == "all" for k, v in row["not_measured"].items()},
            "skipped": facts["skipped"],
            "overlap": facts["overlap"],
            **({"note": "samples are longer than their clips: transcripts repeat"} if facts["repeated"] else {}),
            "seconds": {kind: round(spent, 2) for kind, spent in self.times.items()},
        }


def _detail(one: MetricValue) -> Row:
    known = one.low is not None
    return {"count": one.count, "failed": one.failed} | ({"low": one.low, "high": one.high} if known else {})


def _batch_speed(outcomes: Sequence[TaskResult]) -> Numbers:
    """Seconds of clip per second of computation where many streams run at once."""
    made = sum(o.length * len(o.prompts) for o in outcomes)
    return {
        "batch_seconds_per_second": made / sum(o.seconds for o in outcomes),
        "batch_rows": float(max(len(o.prompts) for o in outcomes)),
    }
