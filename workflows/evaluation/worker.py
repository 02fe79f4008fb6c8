"""Makes and reads samples: one batch of one setting at a time, in this process or in a worker of Ray's."""

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

MAX_SAVED_SAMPLES = 2  # clips of every setting that are kept
MetricDict = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SampleTask:
    """One batch of one setting: what is done, kept and sent to a worker as one."""

    setting: SweepPoint
    batch: int
    prompts: tuple[int, ...]  # places among the held-out prompts

    @property
    def is_first(self) -> bool:
        """The batch that also brings the setting's speed."""
        return self.batch == 0


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task gave."""

    prompts: tuple[int, ...]
    readings: tuple[ClipFeatures, ...]
    length: float  # seconds of each sample
    seconds: float  # that sampling took
    samples: dict[int, bytes]  # prompt -> mp4, of those that are kept
    setting_metrics: MetricDict  # of the setting: speed of a single stream, history use


class EvaluationWorker:
    """Holds one network at a time: tasks should come checkpoint after checkpoint."""

    def __init__(self, held: EvaluationSet, instruments: FeatureModels) -> None:
        self.held, self.instruments = held, instruments
        self.reader = FeatureExtractor(held, instruments)
        self._streamer: tuple[EvaluatedCheckpoint, StreamingPipeline] | None = None
        self._uses: dict[tuple[EvaluatedCheckpoint, str], MetricDict] = {}

    def set_num_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def pipeline_for(self, subject: EvaluatedCheckpoint) -> StreamingPipeline:
        if self._streamer is None or self._streamer[0] != subject:
            self._streamer = (subject, StreamingPipeline.from_checkpoint(subject.path, precision=subject.precision))
        return self._streamer[1]

    def measure_once(self, setting: SweepPoint) -> MetricDict:
        """What belongs to a setting rather than to a sample: its speed alone, and how its mode reads history."""
        subject, how = setting.subject, setting.how
        streamer, key = self.pipeline_for(subject), (subject, how.mode)
        if key not in self._uses:
            self._uses[key] = measure_history_use(streamer, self.held.prompts, how)
        return measure_stream_speed(streamer, self.held.prompts[0], how) | self._uses[key]

    def sample_batch(self, task: SampleTask) -> SampledBatch:
        return sample_batch(self.pipeline_for(task.setting.subject), self._prompts(task), task.setting.how)

    def extract_features(self, task: SampleTask, batch: SampledBatch, once: MetricDict) -> TaskResult:
        """Decode and read the samples."""
        signals = decode_batch(self.pipeline_for(task.setting.subject), batch)
        numbers = {p: self.held.prompts[p].number for p in task.prompts}
        kept = {p: s for p, s in zip(task.prompts, signals, strict=True) if numbers[p] < MAX_SAVED_SAMPLES}
        return TaskResult(
            prompts=task.prompts,
            readings=tuple(self.reader.extract(s) for s in signals),
            length=float(batch.length),
            seconds=batch.seconds,
            samples={p: self.encode_mp4(s) for p, s in kept.items()},
            setting_metrics=once,
        )

    def run_task(self, task: SampleTask) -> TaskResult:
        """All of it."""
        once = self.measure_once(task.setting) if task.is_first else {}
        return self.extract_features(task, self.sample_batch(task), once)

    def extract_real_features(self, places: Sequence[int]) -> list[ClipFeatures]:
        """Some of the real clips, as the codecs keep them."""
        signals = decode_real_clips(self.held, [self.held.real_clips[i] for i in places])
        return [self.reader.extract(s) for s in signals]

    def encode_mp4(self, signals: DecodedClip) -> bytes:
        """As it plays."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(
                path,
                None if signals.frames is None else signals.frames.numpy(),
                frame_rate_of(self.held.meta) if signals.frames is not None else None,
                None if signals.sound is None else signals.sound.numpy(),
                sample_rate=self.reader.sample_rate if signals.sound is not None else None,
            )
            return path.read_bytes()

    def _prompts(self, task: SampleTask) -> Sequence[Prompt]:
        return [self.held.prompts[p] for p in task.prompts]
