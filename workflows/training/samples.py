"""Samples of a training: held-out conditions continued by its EMA weights, in every mode that the stage trains.

They are made while it trains, every ``sample_every`` samples, and from its checkpoint at its end. The first rank makes
them and the others wait: nothing that training draws from is touched, so its numbers are the same with and without.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from mfcore.ema import Ema, WholeWeights
from mfcore.model.transformer import build_model
from mfcore.steps import Mode
from preprocessing.mp4 import write_mp4
from workflows.checkpoint import OUTCOME, RECORD, ModelCard, Progress, load_export, read_json
from workflows.config import RunConfig, Stage
from workflows.generate import sampling
from workflows.heldout import HeldOut, Signals, frame_rate, real_signals, select
from workflows.sampler import decode, generate
from workflows.streamer import Sampling, Streamer
from workflows.tracking import Tracker
from workflows.training import ranks
from workflows.training.alarms import Alarms, HistoryWatch, Liveliness, ScoreGap, compare, liveliness

CLIPS = 2
MULTI_STEPS = 8  # fewer than `mfctl generate` takes: this is a look, not a measurement
FOLDER = "samples"


def modes(stage: Stage) -> tuple[Mode, ...]:
    """Only the mutual stage has trained the few-step mode."""
    return ("few", "multi") if stage == "mutual" else ("multi",)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Samples of a run's last step."""

    paths: list[Path]
    numbers: dict[str, float]  # to log; none where the run has logged them itself


class Sampler:
    """Makes samples of one run and compares them with the clips whose conditions they continue."""

    def __init__(self, run_dir: Path, data: str, held_out: float) -> None:
        self._folder, self._data, self._fraction = run_dir / FOLDER, data, held_out

    @cached_property
    def _held(self) -> HeldOut:
        return select(self._data, clips=CLIPS, seconds=None, fraction=self._fraction)

    @cached_property
    def _real(self) -> Liveliness:
        """Of what the codecs keep of the real clips."""
        clips = [prompt.clip for prompt in self._held.prompts]
        return liveliness(real_signals(self._held, clips), self._held.meta.timeline())

    def paths(self, stage: Stage, step: int) -> list[Path]:
        return [self._path(step, self._how(stage, m), p.number) for m in modes(stage) for p in self._held.prompts]

    def make(self, model: nn.Module, card: ModelCard, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Write the files of ``step``; numbers to log, and what is wrong with the samples."""
        began = time.perf_counter()
        streamer = Streamer(model, card)
        self._folder.mkdir(exist_ok=True)
        numbers: dict[str, float] = {}
        wrong: dict[str, str] = {}
        kinds: set[str] = set()
        for mode in modes(card.stage):
            found = liveliness(self._write(streamer, self._how(card.stage, mode), step), self._held.meta.timeline())
            ratios, bad = compare(mode, found, self._real)
            numbers |= ratios | {f"sample/{name}/{mode}": value for name, value in found.numbers.items()}
            kinds |= found.numbers.keys()
            wrong |= bad
        numbers |= {f"sample/{name}/real": value for name, value in self._real.numbers.items() if name in kinds}
        return numbers | {"alarm/raised": float(len(wrong)), "sample/seconds": time.perf_counter() - began}, wrong

    def _how(self, stage: Stage, mode: Mode) -> Sampling:
        steps = MULTI_STEPS if mode == "multi" else None
        return sampling(stage, mode=mode, steps=steps, guidance=None, trust=None, seed=0)

    def _write(self, streamer: Streamer, how: Sampling, step: int) -> list[Signals]:
        """One file for each prompt; what they show."""
        out: list[Signals] = []
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
                out.append(signals)
        return out

    def _path(self, step: int, how: Sampling, number: int) -> Path:
        return self._folder / f"step-{step:08d}-{how.mode}-{how.steps}-steps-clip-{number}.mp4"


class Looks:
    """What a run sees of itself: samples when they are due, and the alarms. Called by all ranks at every step's end."""

    def __init__(
        self, config: RunConfig, card: ModelCard, ema: Ema, sampler: Sampler, tracker: Tracker, alarms: Alarms,
        beat: Callable[[int, str], object], say: Callable[[str], None], watch: HistoryWatch | None = None,
    ) -> None:  # fmt: skip
        self._config, self._card, self._ema, self._sampler = config, card, ema, sampler
        self._tracker, self._alarms, self._beat, self._say = tracker, alarms, beat, say
        self._gap, self._watch = ScoreGap(), watch

    def __call__(self, progress: Progress, log: Mapping[str, float]) -> dict[str, float]:
        """Numbers to log besides ``log``."""
        numbers, wrong = self._gap.read(log)
        if ranks.rank() == 0 and numbers:
            self._alarms.update("fake score", wrong, progress.step)
        numbers |= self._history(progress.step)
        return numbers | (self._samples(progress.step) if self.due(progress) else {})

    def _history(self, step: int) -> dict[str, float]:
        if self._watch is None or (step % self._config.eval_every and step != self._config.steps):
            return {}
        numbers, wrong = self._watch.read(self._ema.model)
        if ranks.rank() == 0:
            self._alarms.update("history", wrong, step)
        return numbers

    def due(self, progress: Progress) -> bool:
        every, seen = self._config.sample_every, progress.samples_seen
        if not every:
            return False
        return progress.step == self._config.steps or seen // every > (seen - self._config.data.batch) // every

    def _samples(self, step: int) -> dict[str, float]:
        model = whole_network(self._ema, self._card)
        if ranks.rank() == 0:
            self._beat(step - 1, "making samples after")  # the others have beaten for this step that they wait
        numbers = self._make(model, step) if ranks.rank() == 0 else {}
        ranks.barrier()
        return numbers

    def _make(self, model: nn.Module, step: int) -> dict[str, float]:
        try:
            numbers, wrong = self._sampler.make(model, self._card, step)
        except (OSError, ValueError, RuntimeError) as error:  # no file, no codec, no memory: training goes on
            self._say(f"no samples at step {step}: {error}")
            return {}
        for path in self._sampler.paths(self._card.stage, step):
            self._tracker.artifact(path, FOLDER)
        self._say(f"samples of step {step} made in {numbers['sample/seconds']:.1f} s, {FOLDER}/step-{step:08d}-*")
        self._alarms.update("samples", wrong, step)
        return numbers


def whole_network(ema: Ema, card: ModelCard) -> nn.Module:
    """The average as a network that one rank can run alone. Called by all ranks."""
    if type(ema.storage) is WholeWeights:
        return ema.module
    weights = ema.state_dict()
    model = build_model(card.model, 0)
    model.load_state_dict(weights)
    return model.to(next(iter(weights.values())).device).eval().requires_grad_(False)


def training_samples(run_dir: Path) -> Made:
    """The samples of a finished run's last step, made from its checkpoint unless they were made while it trained."""
    record, step = read_json(run_dir / RECORD), read_json(run_dir / OUTCOME)["progress"]["step"]
    sampler = Sampler(run_dir, record["data"], record["config"]["data"]["held_out"])
    paths = sampler.paths(record["stage"], step)
    if all(path.exists() for path in paths):
        return Made(paths=paths, numbers={})
    numbers, wrong = sampler.make(*load_export(run_dir), step)
    Alarms(run_dir, lambda text: print(text, file=sys.stderr, flush=True)).update("samples", wrong, step)
    return Made(paths=paths, numbers=numbers)
