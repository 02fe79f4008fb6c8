"""Samples of a training run: held-out conditions with the EMA weights, in all trained modes, and their scores.

Files in the run directory:

    samples/step-<step>-<mode>-<steps>-steps-clip-<number>.mp4
    looks/step-<step>.json      sample report: metrics, alarms, metrics that are not measured; written last
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mfcore.metrics.windows import DEFAULT_WINDOWS, parse_windows
from mfcore.solver import Mode
from preprocessing.media.mp4_writer import write_mp4
from workflows.checkpoints.layout import OUTCOME_FILE, RUN_FILE
from workflows.checkpoints.load import load_export
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config import serialization
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.feature_models import FeatureModels, parse_feature_models
from workflows.evaluation.feature_reader import FeatureExtractor
from workflows.evaluation.held_out import EvaluationSet, frame_rate_of, select_evaluation_set
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.metrics.registry import compute_metrics_by_window
from workflows.evaluation.sampling import decode_batch, sample_all
from workflows.evaluation.signals import DecodedClip, decode_real_clips
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.sampling import SamplingParams, resolve_sampling_params
from workflows.training.collapse_alarms import CollapseStatistics, collapse_statistics, compare_to_real
from workflows.utils import distributed
from workflows.utils.json_io import read_json, write_json

MULTI_STEPS = 8  # fewer than in `mfctl generate`: a quick check, not a measurement
REFERENCE_CLIPS = 8  # real clips for the distances
FOLDER, LOOKS = "samples", "looks"
DRIFT_METRICS = ("identity_error", "face_similarity", "frechet", "sync", "syllable_error", "valid")
"""Metrics that are also logged by window of time, for clips of two windows or more."""


def sampling_modes(stage: Stage) -> tuple[Mode, ...]:
    """Return the trained modes: only the mutual stage trains the few-step mode."""
    return ("few", "multi") if stage == "mutual" else ("multi",)


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """Sample report: metrics and alarms of the samples of one step."""

    step: int
    numbers: dict[str, float] = field(default_factory=dict[str, float])  # to log
    wrong: dict[str, str] = field(default_factory=dict[str, str])  # active alarms: name -> message
    not_measured: dict[str, str] = field(default_factory=dict[str, str])  # metric -> unmet requirement
    files: list[str] = field(default_factory=list[str])
    error: str = ""  # why there are no samples

    def write(self, run_dir: Path) -> None:
        """Write the report into the run directory."""
        (run_dir / LOOKS).mkdir(exist_ok=True)
        write_json(report_path(run_dir, self.step), asdict(self))


def report_path(run_dir: Path, step: int) -> Path:
    """Return the path of the sample report of a step."""
    return run_dir / LOOKS / f"step-{step:08d}.json"


def load_report(path: Path) -> SampleReport:
    """Read a sample report."""
    return SampleReport(**read_json(path))


class SampleEvaluator:
    """Generator and scorer of the samples of one run, compared with the clips of the same conditions."""

    def __init__(self, run_dir: Path, data: str, config: RunConfig) -> None:
        self._run_dir, self._data = run_dir, data
        self._fraction, self._clips, self._weights = config.data.held_out, config.sample_clips, config.sample_weights

    @cached_property
    def _evaluation_set(self) -> EvaluationSet:
        return select_evaluation_set(
            self._data, clips=self._clips, seconds=None, fraction=self._fraction, reference=REFERENCE_CLIPS
        )

    @cached_property
    def _reader(self) -> FeatureExtractor:
        models: FeatureModels = parse_feature_models(self._weights)
        return FeatureExtractor(self._evaluation_set, models)

    @cached_property
    def _real(self) -> tuple[CollapseStatistics, ReferenceFeatures]:
        """Statistics and features of the real clips, after the codecs."""
        clips = decode_real_clips(self._evaluation_set, [prompt.clip for prompt in self._evaluation_set.prompts])
        others = decode_real_clips(self._evaluation_set, self._evaluation_set.reference)
        read = self._reader.extract
        real = ReferenceFeatures(prompts=[read(s) for s in clips], reference=[read(s) for s in others])
        return collapse_statistics(clips, self._evaluation_set.meta.timeline()), real

    def sample_paths(self, stage: Stage, step: int) -> list[Path]:
        """Return the paths of the sample files of a step."""
        return [
            self._path(step, self._params(stage, m), p.number)
            for m in sampling_modes(stage)
            for p in self._evaluation_set.prompts
        ]

    def evaluate(self, model: nn.Module, metadata: ExportMetadata, step: int) -> SampleReport:
        """Generate and score the samples of ``step`` and write the report, which contains any error."""
        try:
            report = self._generate_and_score(StreamingPipeline(model, metadata), step)
        except (OSError, ValueError, RuntimeError) as error:  # missing file or codec, out of memory: training continues
            report = SampleReport(step=step, error=str(error) or type(error).__name__)
        report.write(self._run_dir)
        return report

    def _generate_and_score(self, streamer: StreamingPipeline, step: int) -> SampleReport:
        start, stage = time.perf_counter(), streamer.metadata.stage
        real_statistics, real = self._real
        numbers: dict[str, float] = {}
        wrong: dict[str, str] = {}
        missing: dict[str, str] = {}
        for mode in sampling_modes(stage):
            signals = self._write(streamer, self._params(stage, mode), step)
            ratios, alarms = compare_to_real(
                mode, collapse_statistics(signals, self._evaluation_set.meta.timeline()), real_statistics
            )
            scores, unmeasured = self._scores(mode, [self._reader.extract(s) for s in signals], real)
            numbers |= ratios | scores
            wrong |= alarms
            missing |= unmeasured
        measured = {name.split("/")[1] for name in numbers if name.startswith("sample/")}
        real_scores, _ = self._scores("real", real.prompts, real)
        numbers |= {name: value for name, value in real_scores.items() if name.split("/")[1] in measured}
        numbers |= {"alarm/raised": float(len(wrong)), "sample/seconds": time.perf_counter() - start}
        files = [str(path) for path in self.sample_paths(stage, step)]
        return SampleReport(step=step, numbers=numbers, wrong=wrong, not_measured=missing, files=files)

    def _scores(
        self, name: str, part: Sequence[ClipFeatures], real: ReferenceFeatures
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return ``sample/METRIC/name``, the same by window for metrics that may drift, and unmeasured metrics."""
        lengths = [float(p.chunks * self._evaluation_set.meta.chunk_seconds) for p in self._evaluation_set.prompts]
        whole, *windows = compute_metrics_by_window(part, lengths, parse_windows(DEFAULT_WINDOWS), real)
        numbers = {f"sample/{metric}/{name}": value for metric, value in whole.scores.metrics.items()}
        for one in windows if len(windows) > 1 else ():
            values = one.scores.metrics
            numbers |= {f"sample/{m}/{name}/{one.window}": values[m] for m in DRIFT_METRICS if m in values}
        return numbers, whole.scores.not_measured

    def _params(self, stage: Stage, mode: Mode) -> SamplingParams:
        steps = MULTI_STEPS if mode == "multi" else None
        return resolve_sampling_params(stage, mode=mode, steps=steps, guidance=None, trust=None, seed=0)

    def _write(self, streamer: StreamingPipeline, params: SamplingParams, step: int) -> list[DecodedClip]:
        """Write one file per prompt; return the decoded clips in the order of prompts."""
        out: dict[int, DecodedClip] = {}
        (self._run_dir / FOLDER).mkdir(exist_ok=True)
        for batch in sample_all(streamer, self._evaluation_set.prompts, params):
            for prompt, signals in zip(batch.prompts, decode_batch(streamer, batch), strict=True):
                frames = None if signals.frames is None else signals.frames.numpy()
                sound = None if signals.sound is None else signals.sound.numpy()
                write_mp4(
                    self._path(step, params, prompt.number),
                    frames,
                    None if frames is None else frame_rate_of(self._evaluation_set.meta),
                    sound,
                    sample_rate=None if sound is None else streamer.sample_rate,
                )
                out[prompt.number] = signals
        return [out[number] for number in sorted(out)]

    def _path(self, step: int, params: SamplingParams, number: int) -> Path:
        return self._run_dir / FOLDER / f"step-{step:08d}-{params.mode}-{params.steps}-steps-clip-{number}.mp4"


def sample_evaluator_for(run_dir: Path) -> SampleEvaluator:
    """Return the evaluator of a run, configured by its record."""
    record: dict[str, Any] = read_json(run_dir / RUN_FILE)
    return SampleEvaluator(run_dir, record["data"], serialization.from_dict(RunConfig, record["config"]))


def final_samples(run_dir: Path) -> list[Path]:
    """Return the sample files of a finished run, generated from its checkpoint unless they exist."""
    step = read_json(run_dir / OUTCOME_FILE)["progress"]["step"]
    if not report_path(run_dir, step).exists():
        model, metadata = load_export(run_dir)
        sample_evaluator_for(run_dir).evaluate(model.to(distributed.local_device()), metadata, step)
    return [Path(path) for path in load_report(report_path(run_dir, step)).files]
