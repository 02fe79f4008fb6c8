"""Samples of a training: held-out conditions continued by its EMA weights, in every mode that the stage trains, and
their scores by the readers and metrics of ``mfctl evaluate``.

    samples/step-<step>-<mode>-<steps>-steps-clip-<number>.mp4
    looks/step-<step>.json      what they show: numbers, alarms, what is not measured and why; put last
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

MULTI_STEPS = 8  # fewer than `mfctl generate` takes: this is a look, not a measurement
REFERENCE_CLIPS = 8  # real clips that distances are measured against
FOLDER, LOOKS = "samples", "looks"
DRIFT_METRICS = ("identity_error", "face_similarity", "frechet", "sync", "syllable_error", "valid")
"""Metrics that are logged by window of time too, where clips are long enough for two windows."""


def sampling_modes(stage: Stage) -> tuple[Mode, ...]:
    """Only the mutual stage has trained the few-step mode."""
    return ("few", "multi") if stage == "mutual" else ("multi",)


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What the samples of one step show."""

    step: int
    numbers: dict[str, float] = field(default_factory=dict[str, float])  # to log
    wrong: dict[str, str] = field(default_factory=dict[str, str])  # alarms that are on, in words
    not_measured: dict[str, str] = field(default_factory=dict[str, str])  # metric -> what it needs
    files: list[str] = field(default_factory=list[str])
    error: str = ""  # why there are no samples

    def write(self, run_dir: Path) -> None:
        (run_dir / LOOKS).mkdir(exist_ok=True)
        write_json(report_path(run_dir, self.step), asdict(self))


def report_path(run_dir: Path, step: int) -> Path:
    return run_dir / LOOKS / f"step-{step:08d}.json"


def load_report(path: Path) -> SampleReport:
    return SampleReport(**read_json(path))


class SampleEvaluator:
    """Makes and scores samples of one run, beside the clips whose conditions they continue."""

    def __init__(self, run_dir: Path, data: str, config: RunConfig) -> None:
        self._run_dir, self._data = run_dir, data
        self._fraction, self._clips, self._weights = config.data.held_out, config.sample_clips, config.sample_weights

    @cached_property
    def _held(self) -> EvaluationSet:
        return select_evaluation_set(
            self._data, clips=self._clips, seconds=None, fraction=self._fraction, reference=REFERENCE_CLIPS
        )

    @cached_property
    def _reader(self) -> FeatureExtractor:
        instruments: FeatureModels = parse_feature_models(self._weights)
        return FeatureExtractor(self._held, instruments)

    @cached_property
    def _real(self) -> tuple[CollapseStatistics, ReferenceFeatures]:
        """What the codecs keep of the real clips."""
        clips = decode_real_clips(self._held, [prompt.clip for prompt in self._held.prompts])
        others = decode_real_clips(self._held, self._held.reference)
        read = self._reader.extract
        real = ReferenceFeatures(prompts=[read(s) for s in clips], reference=[read(s) for s in others])
        return collapse_statistics(clips, self._held.meta.timeline()), real

    def sample_paths(self, stage: Stage, step: int) -> list[Path]:
        return [
            self._path(step, self._how(stage, m), p.number) for m in sampling_modes(stage) for p in self._held.prompts
        ]

    def evaluate(self, model: nn.Module, metadata: ExportMetadata, step: int) -> SampleReport:
        """Make, read and score the samples of ``step``, and write all of it down. What fails is said, not raised."""
        try:
            look = self._look(StreamingPipeline(model, metadata), step)
        except (OSError, ValueError, RuntimeError) as error:  # no file, no codec, no memory: training goes on
            look = SampleReport(step=step, error=str(error) or type(error).__name__)
        look.write(self._run_dir)
        return look

    def _look(self, streamer: StreamingPipeline, step: int) -> SampleReport:
        began, stage = time.perf_counter(), streamer.metadata.stage
        alive, real = self._real
        numbers: dict[str, float] = {}
        wrong: dict[str, str] = {}
        missing: dict[str, str] = {}
        for mode in sampling_modes(stage):
            signals = self._write(streamer, self._how(stage, mode), step)
            ratios, bad = compare_to_real(mode, collapse_statistics(signals, self._held.meta.timeline()), alive)
            scores, lacking = self._scores(mode, [self._reader.extract(s) for s in signals], real)
            numbers |= ratios | scores
            wrong |= bad
            missing |= lacking
        measured = {name.split("/")[1] for name in numbers if name.startswith("sample/")}
        theirs, _ = self._scores("real", real.prompts, real)
        numbers |= {name: value for name, value in theirs.items() if name.split("/")[1] in measured}
        numbers |= {"alarm/raised": float(len(wrong)), "sample/seconds": time.perf_counter() - began}
        files = [str(path) for path in self.sample_paths(stage, step)]
        return SampleReport(step=step, numbers=numbers, wrong=wrong, not_measured=missing, files=files)

    def _scores(
        self, name: str, part: Sequence[ClipFeatures], real: ReferenceFeatures
    ) -> tuple[dict[str, float], dict[str, str]]:
        """``sample/METRIC/name``, and ``sample/METRIC/name/WINDOW`` of what may drift; what is not measured."""
        lengths = [float(p.chunks * self._held.meta.chunk_seconds) for p in self._held.prompts]
        whole, *windows = compute_metrics_by_window(part, lengths, parse_windows(DEFAULT_WINDOWS), real)
        numbers = {f"sample/{metric}/{name}": value for metric, value in whole.scores.metrics.items()}
        for one in windows if len(windows) > 1 else ():
            values = one.scores.metrics
            numbers |= {f"sample/{m}/{name}/{one.window}": values[m] for m in DRIFT_METRICS if m in values}
        return numbers, whole.scores.not_measured

    def _how(self, stage: Stage, mode: Mode) -> SamplingParams:
        steps = MULTI_STEPS if mode == "multi" else None
        return resolve_sampling_params(stage, mode=mode, steps=steps, guidance=None, trust=None, seed=0)

    def _write(self, streamer: StreamingPipeline, how: SamplingParams, step: int) -> list[DecodedClip]:
        """One file for each prompt; what they show, in the order of prompts."""
        out: dict[int, DecodedClip] = {}
        (self._run_dir / FOLDER).mkdir(exist_ok=True)
        for batch in sample_all(streamer, self._held.prompts, how):
            for prompt, signals in zip(batch.prompts, decode_batch(streamer, batch), strict=True):
                frames = None if signals.frames is None else signals.frames.numpy()
                sound = None if signals.sound is None else signals.sound.numpy()
                write_mp4(
                    self._path(step, how, prompt.number),
                    frames,
                    None if frames is None else frame_rate_of(self._held.meta),
                    sound,
                    sample_rate=None if sound is None else streamer.sample_rate,
                )
                out[prompt.number] = signals
        return [out[number] for number in sorted(out)]

    def _path(self, step: int, how: SamplingParams, number: int) -> Path:
        return self._run_dir / FOLDER / f"step-{step:08d}-{how.mode}-{how.steps}-steps-clip-{number}.mp4"


def sample_evaluator_for(run_dir: Path) -> SampleEvaluator:
    """From the run's own record."""
    record: dict[str, Any] = read_json(run_dir / RUN_FILE)
    return SampleEvaluator(run_dir, record["data"], serialization.from_dict(RunConfig, record["config"]))


def final_samples(run_dir: Path) -> list[Path]:
    """Sample files of a finished run's last step, made from its checkpoint unless they were made while it trained."""
    step = read_json(run_dir / OUTCOME_FILE)["progress"]["step"]
    if not report_path(run_dir, step).exists():
        model, metadata = load_export(run_dir)
        sample_evaluator_for(run_dir).evaluate(model.to(distributed.local_device()), metadata, step)
    return [Path(path) for path in load_report(report_path(run_dir, step)).files]
