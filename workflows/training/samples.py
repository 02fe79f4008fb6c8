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

from mfcore.metrics.windows import PUBLISHED, parse_windows
from mfcore.solver import Mode
from preprocessing.media.mp4_writer import write_mp4
from workflows.checkpoints.layout import OUTCOME, RECORD
from workflows.checkpoints.load import load_export
from workflows.checkpoints.model_card import ModelCard
from workflows.config import serialization
from workflows.config.run import RunConfig, Stage
from workflows.evaluation.clip_features import Reading
from workflows.evaluation.feature_models import Instruments, parse_weights
from workflows.evaluation.feature_reader import Reader
from workflows.evaluation.held_out import HeldOut, frame_rate, select
from workflows.evaluation.metrics.generic import Real
from workflows.evaluation.metrics.registry import score_windows
from workflows.evaluation.sampling import decode, generate
from workflows.evaluation.signals import Signals, real_signals
from workflows.inference.pipeline import Streamer
from workflows.inference.sampling import Sampling, sampling
from workflows.training.collapse_alarms import Liveliness, compare, liveliness
from workflows.utils import distributed
from workflows.utils.json_io import read_json, write_json

MULTI_STEPS = 8  # fewer than `mfctl generate` takes: this is a look, not a measurement
REFERENCE = 8  # real clips that distances are measured against
FOLDER, LOOKS = "samples", "looks"
DRIFT = ("identity_error", "face_similarity", "frechet", "sync", "syllable_error", "valid")
"""Metrics that are logged by window of time too, where clips are long enough for two windows."""


def modes(stage: Stage) -> tuple[Mode, ...]:
    """Only the mutual stage has trained the few-step mode."""
    return ("few", "multi") if stage == "mutual" else ("multi",)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the samples of one step show."""

    step: int
    numbers: dict[str, float] = field(default_factory=dict[str, float])  # to log
    wrong: dict[str, str] = field(default_factory=dict[str, str])  # alarms that are on, in words
    not_measured: dict[str, str] = field(default_factory=dict[str, str])  # metric -> what it needs
    files: list[str] = field(default_factory=list[str])
    error: str = ""  # why there are no samples

    def write(self, run_dir: Path) -> None:
        (run_dir / LOOKS).mkdir(exist_ok=True)
        write_json(look_path(run_dir, self.step), asdict(self))


def look_path(run_dir: Path, step: int) -> Path:
    return run_dir / LOOKS / f"step-{step:08d}.json"


def read_look(path: Path) -> Look:
    return Look(**read_json(path))


class Sampler:
    """Makes and scores samples of one run, beside the clips whose conditions they continue."""

    def __init__(self, run_dir: Path, data: str, config: RunConfig) -> None:
        self._run_dir, self._data = run_dir, data
        self._fraction, self._clips, self._weights = config.data.held_out, config.sample_clips, config.sample_weights

    @cached_property
    def _held(self) -> HeldOut:
        return select(self._data, clips=self._clips, seconds=None, fraction=self._fraction, reference=REFERENCE)

    @cached_property
    def _reader(self) -> Reader:
        instruments: Instruments = parse_weights(self._weights)
        return Reader(self._held, instruments)

    @cached_property
    def _real(self) -> tuple[Liveliness, Real]:
        """What the codecs keep of the real clips."""
        clips = real_signals(self._held, [prompt.clip for prompt in self._held.prompts])
        others = real_signals(self._held, self._held.reference)
        read = self._reader.read
        real = Real(prompts=[read(s) for s in clips], reference=[read(s) for s in others])
        return liveliness(clips, self._held.meta.timeline()), real

    def paths(self, stage: Stage, step: int) -> list[Path]:
        return [self._path(step, self._how(stage, m), p.number) for m in modes(stage) for p in self._held.prompts]

    def look(self, model: nn.Module, card: ModelCard, step: int) -> Look:
        """Make, read and score the samples of ``step``, and write all of it down. What fails is said, not raised."""
        try:
            look = self._look(Streamer(model, card), step)
        except (OSError, ValueError, RuntimeError) as error:  # no file, no codec, no memory: training goes on
            look = Look(step=step, error=str(error) or type(error).__name__)
        look.write(self._run_dir)
        return look

    def _look(self, streamer: Streamer, step: int) -> Look:
        began, stage = time.perf_counter(), streamer.card.stage
        alive, real = self._real
        numbers: dict[str, float] = {}
        wrong: dict[str, str] = {}
        missing: dict[str, str] = {}
        for mode in modes(stage):
            signals = self._write(streamer, self._how(stage, mode), step)
            ratios, bad = compare(mode, liveliness(signals, self._held.meta.timeline()), alive)
            scores, lacking = self._scores(mode, [self._reader.read(s) for s in signals], real)
            numbers |= ratios | scores
            wrong |= bad
            missing |= lacking
        measured = {name.split("/")[1] for name in numbers if name.startswith("sample/")}
        theirs, _ = self._scores("real", real.prompts, real)
        numbers |= {name: value for name, value in theirs.items() if name.split("/")[1] in measured}
        numbers |= {"alarm/raised": float(len(wrong)), "sample/seconds": time.perf_counter() - began}
        files = [str(path) for path in self.paths(stage, step)]
        return Look(step=step, numbers=numbers, wrong=wrong, not_measured=missing, files=files)

    def _scores(self, name: str, part: Sequence[Reading], real: Real) -> tuple[dict[str, float], dict[str, str]]:
        """``sample/METRIC/name``, and ``sample/METRIC/name/WINDOW`` of what may drift; what is not measured."""
        lengths = [float(p.chunks * self._held.meta.chunk_seconds) for p in self._held.prompts]
        whole, *windows = score_windows(part, lengths, parse_windows(PUBLISHED), real)
        numbers = {f"sample/{metric}/{name}": value for metric, value in whole.scores.metrics.items()}
        for one in windows if len(windows) > 1 else ():
            values = one.scores.metrics
            numbers |= {f"sample/{m}/{name}/{one.window}": values[m] for m in DRIFT if m in values}
        return numbers, whole.scores.not_measured

    def _how(self, stage: Stage, mode: Mode) -> Sampling:
        steps = MULTI_STEPS if mode == "multi" else None
        return sampling(stage, mode=mode, steps=steps, guidance=None, trust=None, seed=0)

    def _write(self, streamer: Streamer, how: Sampling, step: int) -> list[Signals]:
        """One file for each prompt; what they show, in the order of prompts."""
        out: dict[int, Signals] = {}
        (self._run_dir / FOLDER).mkdir(exist_ok=True)
        for batch in generate(streamer, self._held.prompts, how):
            for prompt, signals in zip(batch.prompts, decode(streamer, batch), strict=True):
                frames = None if signals.frames is None else signals.frames.numpy()
                sound = None if signals.sound is None else signals.sound.numpy()
                write_mp4(
                    self._path(step, how, prompt.number),
                    frames,
                    None if frames is None else frame_rate(self._held.meta),
                    sound,
                    None if sound is None else streamer.sample_rate,
                )
                out[prompt.number] = signals
        return [out[number] for number in sorted(out)]

    def _path(self, step: int, how: Sampling, number: int) -> Path:
        return self._run_dir / FOLDER / f"step-{step:08d}-{how.mode}-{how.steps}-steps-clip-{number}.mp4"


def sampler_of(run_dir: Path) -> Sampler:
    """From the run's own record."""
    record: dict[str, Any] = read_json(run_dir / RECORD)
    return Sampler(run_dir, record["data"], serialization.load(RunConfig, record["config"]))


def training_samples(run_dir: Path) -> list[Path]:
    """Sample files of a finished run's last step, made from its checkpoint unless they were made while it trained."""
    step = read_json(run_dir / OUTCOME)["progress"]["step"]
    if not look_path(run_dir, step).exists():
        model, card = load_export(run_dir)
        sampler_of(run_dir).look(model.to(distributed.device()), card, step)
    return [Path(path) for path in read_look(look_path(run_dir, step)).files]
