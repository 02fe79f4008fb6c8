"""Evaluation worker: samples, decodes and extracts features, one batch of one setting at a time."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.media.mp4_writer import write_mp4
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.feature_models import FeatureModels
from workflows.evaluation.feature_reader import FeatureExtractor
from workflows.evaluation.held_out import EvaluationSet, Prompt, frame_rate_of
from workflows.evaluation.sampling import (
    SampledBatch,
    decode_batch,
    measure_history_use,
    measure_stream_speed,
    sample_batch,
)
from workflows.evaluation.signals import DecodedClip, decode_real_clips
from workflows.evaluation.sweep import EvaluatedCheckpoint, SweepPoint
from workflows.inference.pipeline import StreamingPipeline

MAX_SAVED_SAMPLES = 2  # clips per setting that are stored
MetricDict = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SampleTask:
    """One batch of one setting: the unit of work and of storage."""

    point: SweepPoint
    batch: int
    prompts: tuple[int, ...]  # indices of prompts

    @property
    def is_first(self) -> bool:
        """Return True for the batch that includes the metrics of the setting."""
        return self.batch == 0


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Result of a task."""

    prompts: tuple[int, ...]
    features: tuple[ClipFeatures, ...]
    length: float  # seconds of each sample
    seconds: float  # sampling time
    samples: dict[int, bytes]  # prompt -> mp4 of the stored samples
    setting_metrics: MetricDict  # speed of a single stream, history use


class EvaluationWorker:
    """Runs tasks with one loaded network at a time; tasks should be sorted by checkpoint."""

    def __init__(self, evaluation_set: EvaluationSet, feature_models: FeatureModels) -> None:
        self.evaluation_set, self.feature_models = evaluation_set, feature_models
        self.reader = FeatureExtractor(evaluation_set, feature_models)
        self._pipeline: tuple[EvaluatedCheckpoint, StreamingPipeline] | None = None
        self._history_use: dict[tuple[EvaluatedCheckpoint, str], MetricDict] = {}

    def set_num_threads(self, threads: int) -> None:
        """Set the number of intra-op threads of torch."""
        import torch

        torch.set_num_threads(threads)

    def pipeline_for(self, checkpoint: EvaluatedCheckpoint) -> StreamingPipeline:
        """Return the pipeline of a checkpoint; it replaces the loaded one."""
        if self._pipeline is None or self._pipeline[0] != checkpoint:
            self._pipeline = (
                checkpoint,
                StreamingPipeline.from_checkpoint(checkpoint.source, precision=checkpoint.precision),
            )
        return self._pipeline[1]

    def measure_once(self, point: SweepPoint) -> MetricDict:
        """Measure what depends on the sweep point only: streaming speed and history use."""
        checkpoint, params = point.checkpoint, point.params
        pipeline, key = self.pipeline_for(checkpoint), (checkpoint, params.mode)
        if key not in self._history_use:
            self._history_use[key] = measure_history_use(pipeline, self.evaluation_set.prompts, params)
        return measure_stream_speed(pipeline, self.evaluation_set.prompts[0], params) | self._history_use[key]

    def sample_batch(self, task: SampleTask) -> SampledBatch:
        """Generate the latents of a task."""
        return sample_batch(self.pipeline_for(task.point.checkpoint), self._prompts(task), task.point.params)

    def extract_features(self, task: SampleTask, batch: SampledBatch, setting_metrics: MetricDict) -> TaskResult:
        """Decode samples and extract their features."""
        clips = decode_batch(self.pipeline_for(task.point.checkpoint), batch)
        prompt_numbers = {p: self.evaluation_set.prompts[p].number for p in task.prompts}
        saved = {p: s for p, s in zip(task.prompts, clips, strict=True) if prompt_numbers[p] < MAX_SAVED_SAMPLES}
        return TaskResult(
            prompts=task.prompts,
            features=tuple(self.reader.extract(s) for s in clips),
            length=float(batch.length),
            seconds=batch.seconds,
            samples={p: self.encode_mp4(s) for p, s in saved.items()},
            setting_metrics=setting_metrics,
        )

    def run_task(self, task: SampleTask) -> TaskResult:
        """Sample, decode and extract the features of a task."""
        setting_metrics = self.measure_once(task.point) if task.is_first else {}
        return self.extract_features(task, self.sample_batch(task), setting_metrics)

    def extract_real_features(self, indices: Sequence[int]) -> list[ClipFeatures]:
        """Return the features of some real clips after encoding and decoding."""
        clips = decode_real_clips(self.evaluation_set, [self.evaluation_set.real_clips[i] for i in indices])
        return [self.reader.extract(s) for s in clips]

    def encode_mp4(self, clip: DecodedClip) -> bytes:
        """Return the clip as an mp4 file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(
                path,
                None if clip.frames is None else clip.frames.numpy(),
                frame_rate_of(self.evaluation_set.meta) if clip.frames is not None else None,
                None if clip.sound is None else clip.sound.numpy(),
                sample_rate=self.reader.sample_rate if clip.sound is not None else None,
            )
            return path.read_bytes()

    def _prompts(self, task: SampleTask) -> Sequence[Prompt]:
        return [self.evaluation_set.prompts[p] for p in task.prompts]
