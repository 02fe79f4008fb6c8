"""Makes and reads samples: one batch of one setting at a time, in this process or in a worker of Ray's."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.media.mp4_writer import write_mp4
from workflows.evaluation.clip_features import Reading
from workflows.evaluation.feature_models import Instruments
from workflows.evaluation.feature_reader import Reader
from workflows.evaluation.held_out import HeldOut, Prompt, frame_rate
from workflows.evaluation.sampling import Batch, decode, history_use, sample, stream_speed
from workflows.evaluation.signals import Signals, real_signals
from workflows.evaluation.sweep import Setting, Subject
from workflows.inference.pipeline import Streamer

SAMPLES = 2  # clips of every setting that are kept
Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One batch of one setting: what is done, kept and sent to a worker as one."""

    setting: Setting
    batch: int
    prompts: tuple[int, ...]  # places among the held-out prompts

    @property
    def first(self) -> bool:
        """The batch that also brings the setting's speed."""
        return self.batch == 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task gave."""

    prompts: tuple[int, ...]
    readings: tuple[Reading, ...]
    length: float  # seconds of each sample
    seconds: float  # that sampling took
    samples: dict[int, bytes]  # prompt -> mp4, of those that are kept
    once: Numbers  # of the setting: speed of a single stream, history use


class Examiner:
    """Holds one network at a time: tasks should come checkpoint after checkpoint."""

    def __init__(self, held: HeldOut, instruments: Instruments) -> None:
        self.held, self.instruments = held, instruments
        self.reader = Reader(held, instruments)
        self._streamer: tuple[Subject, Streamer] | None = None
        self._uses: dict[tuple[Subject, str], Numbers] = {}

    def use_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def streamer(self, subject: Subject) -> Streamer:
        if self._streamer is None or self._streamer[0] != subject:
            self._streamer = (subject, Streamer.load(subject.path, precision=subject.precision))
        return self._streamer[1]

    def once(self, setting: Setting) -> Numbers:
        """What belongs to a setting rather than to a sample: its speed alone, and how its mode reads history."""
        subject, how = setting.subject, setting.how
        streamer, key = self.streamer(subject), (subject, how.mode)
        if key not in self._uses:
            self._uses[key] = history_use(streamer, self.held.prompts, how)
        return stream_speed(streamer, self.held.prompts[0], how) | self._uses[key]

    def sample(self, task: Task) -> Batch:
        return sample(self.streamer(task.setting.subject), self._prompts(task), task.setting.how)

    def read(self, task: Task, batch: Batch, once: Numbers) -> Outcome:
        """Decode and read the samples."""
        signals = decode(self.streamer(task.setting.subject), batch)
        numbers = {p: self.held.prompts[p].number for p in task.prompts}
        kept = {p: s for p, s in zip(task.prompts, signals, strict=True) if numbers[p] < SAMPLES}
        return Outcome(
            prompts=task.prompts,
            readings=tuple(self.reader.read(s) for s in signals),
            length=float(batch.length),
            seconds=batch.seconds,
            samples={p: self.mp4(s) for p, s in kept.items()},
            once=once,
        )

    def work(self, task: Task) -> Outcome:
        """All of it."""
        once = self.once(task.setting) if task.first else {}
        return self.read(task, self.sample(task), once)

    def read_real(self, places: Sequence[int]) -> list[Reading]:
        """Some of the real clips, as the codecs keep them."""
        signals = real_signals(self.held, [self.held.real[i] for i in places])
        return [self.reader.read(s) for s in signals]

    def mp4(self, signals: Signals) -> bytes:
        """As it plays."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_mp4(
                path,
                None if signals.frames is None else signals.frames.numpy(),
                frame_rate(self.held.meta) if signals.frames is not None else None,
                None if signals.sound is None else signals.sound.numpy(),
                self.reader.sample_rate if signals.sound is not None else None,
            )
            return path.read_bytes()

    def _prompts(self, task: Task) -> Sequence[Prompt]:
        return [self.held.prompts[p] for p in task.prompts]
