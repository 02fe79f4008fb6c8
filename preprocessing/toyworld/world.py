"""Toy world: mp4 files of talking characters with captions, transcripts and ground truth.

A clip is a pure function of (configuration, seed, index). The caption names the colors of face, hair and background,
the transcript fixes the syllables and their times, the first frame fixes the appearance. The voice is random. The *free
choices* are fixed by no condition: per half second a gaze, brows, a hand, a light and a tone of voice. Hand and light
persist with probability 0.7, so history matters.

Half second k of the video is (0.5 k, 0.5 (k + 1)], of the audio [0.5 k, 0.5 (k + 1)). The first frame thus belongs to
the time before the clip, as in a window of a longer clip. At 24 fps, a codec that encodes the first frame alone and
then groups of four has no group across two choices.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mfcore.errors import UserInputError, check_range
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.records import Word
from preprocessing.speech import flite
from preprocessing.speech.phonemes import mouth_track
from preprocessing.toyworld import english, renderer
from preprocessing.toyworld.english import SpokenSentence
from preprocessing.toyworld.renderer import (
    BACKGROUNDS,
    BROWS,
    FACES,
    GAZES,
    HAIRS,
    HANDS,
    LIGHTS,
    SHAPES,
    STYLES,
    Appearance,
    Pose,
)
from preprocessing.toyworld.voice import (
    MIN_SAMPLE_RATE,
    TONES,
    VOCABULARY,
    VOICES,
    TranscriptWord,
    Voice,
    speech_envelope,
    synthesize,
)

HALF_SECOND = Fraction(1, 2)  # seconds for which a free choice holds
CHOICES = {"gaze": GAZES, "brows": len(BROWS), "hand": len(HANDS), "light": len(LIGHTS), "tone": len(TONES)}
"""Number of modes of each free choice."""
PERSISTENT = {"hand", "light"}
STAY_PROBABILITY = 0.7  # of a persistent choice per half second
VERSION = 1  # of the world: clips of different versions differ for the same seed
_NOTE = "_toyworld.json"
_BLINK = 0.14  # seconds


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Size, rates and seed of a toy world. `fps` may be any argument of ``Fraction``."""

    size: int = 64  # side of a square frame in pixels, even
    fps: Fraction = Fraction(24)
    sample_rate: int = 16000  # Hz
    seconds: float = 10.0
    seed: int = 0
    syllables: int = 16  # size of the vocabulary
    voice: Literal["syllables", "english"] = "syllables"
    held_out: bool = False  # English sentences that no training world contains

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", Fraction(self.fps))
        if not (32 <= self.size <= 512) or self.size % 2:
            raise UserInputError(f"size {self.size}: use an even size from 32 to 512 pixels")
        if self.fps < 8 or self.fps > 120:
            raise UserInputError(f"fps {self.fps}: use 8 to 120; a syllable lasts 0.2 s")
        check_range("sample_rate", self.sample_rate, MIN_SAMPLE_RATE, 384_000)
        check_range("seed", self.seed, 0, 2**63 - 1)
        if not 1 <= self.seconds <= 3600:
            raise UserInputError(f"seconds {self.seconds}: use 1 to 3600 per clip")
        if self.voice not in ("syllables", "english"):
            raise UserInputError(f"voice {self.voice!r}: use syllables or english")
        if self.held_out and self.voice != "english":
            raise UserInputError("held_out: only the English voice has held-out sentences. Use it with voice english")
        if not 12 <= self.syllables <= len(VOCABULARY):
            raise UserInputError(f"syllables {self.syllables}: use 12 to {len(VOCABULARY)}")

    @property
    def choices(self) -> dict[str, int]:
        """Return the number of modes of each free choice; English has no free tone."""
        return {name: modes for name, modes in CHOICES.items() if name != "tone" or self.voice == "syllables"}

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Return the syllables of the world."""
        return VOCABULARY[: self.syllables]

    @property
    def frames(self) -> int:
        """Return the number of frames including the one at the end, for whole groups of a codec."""
        return floor(Fraction(self.seconds).limit_denominator(1000) * self.fps) + 1

    @property
    def samples(self) -> int:
        """Return the number of audio samples of a clip."""
        return round(self.seconds * self.sample_rate)

    @property
    def half_seconds(self) -> int:
        """Return the number of half seconds of a clip."""
        return ceil(self.seconds / HALF_SECOND)


@dataclass(frozen=True, kw_only=True)
class Sway:
    """One harmonic of the motion of the head."""

    x: float  # amplitude in units
    y: float
    frequency: float  # Hz
    phase: float


@dataclass(frozen=True, kw_only=True)
class ToyTruth:
    """Ground truth of one clip."""

    config: ToyConfig
    index: int
    look: Appearance
    voice: int  # position in VOICES
    transcript: tuple[TranscriptWord, ...]
    choices: Mapping[str, tuple[int, ...]]  # per half second
    first: Mapping[str, int]  # choices in the first frame
    blinks: tuple[float, ...]  # seconds at which they start
    sway: tuple[Sway, ...]
    sentences: tuple[SpokenSentence, ...] = ()  # of the English voice

    @property
    def words(self) -> tuple[Word, ...]:
        """Return the transcript as records."""
        return tuple(Word(**w) for w in self.transcript)

    @property
    def frame_times(self) -> NDArray[np.float64]:
        """Return the time of each frame in seconds."""
        return np.arange(self.config.frames) / float(self.config.fps)


def frame_half_seconds(frames: int, fps: Fraction) -> NDArray[np.int64]:
    """Return the half second of each frame; -1 for the first frame."""
    return np.asarray([ceil(j / fps / HALF_SECOND) - 1 for j in range(frames)], np.int64)


def sample_truth(config: ToyConfig, index: int) -> ToyTruth:
    """Return the ground truth of clip `index`, a pure function of (configuration, index)."""
    rng = np.random.default_rng([config.seed, index])
    tables = {"face": FACES, "shape": SHAPES, "hair": HAIRS, "style": STYLES, "background": BACKGROUNDS}
    look = Appearance(**{name: int(rng.integers(len(table))) for name, table in tables.items()})
    chains = {
        name: _chain(rng, modes, config.half_seconds + 1, name in PERSISTENT) for name, modes in config.choices.items()
    }
    voice = int(rng.integers(len(VOICES)))
    sentences, transcript = _draw_speech(rng, config, voice)
    return ToyTruth(
        config=config,
        index=index,
        look=look,
        voice=voice,
        transcript=transcript,
        sentences=sentences,
        choices={name: chain[1:] for name, chain in chains.items()},
        first={name: chain[0] for name, chain in chains.items() if name != "tone"},
        blinks=tuple(
            float(k * HALF_SECOND) + float(rng.uniform(0.1, 0.3))
            for k in range(config.half_seconds)
            if rng.random() < 0.25
        ),
        sway=tuple(
            Sway(
                x=float(a * rng.uniform(0.6, 1)),
                y=float(a * rng.uniform(0.4, 0.8)),
                frequency=float(f),
                phase=float(rng.uniform(0, 6.28)),
            )
            for a, f in ((1.5, rng.uniform(0.12, 0.2)), (0.6, rng.uniform(0.25, 0.4)))
        ),
    )


def _chain(rng: np.random.Generator, modes: int, length: int, persistent: bool) -> tuple[int, ...]:
    """Draw independent modes, or a chain that keeps its mode with STAY_PROBABILITY."""
    chain = [int(rng.integers(modes))]
    while len(chain) < length:
        if not persistent:
            chain.append(int(rng.integers(modes)))
        elif rng.random() < STAY_PROBABILITY:
            chain.append(chain[-1])
        else:
            chain.append((chain[-1] + int(rng.integers(1, modes))) % modes)
    return tuple(chain)


def _draw_speech(
    rng: np.random.Generator, config: ToyConfig, voice: int
) -> tuple[tuple[SpokenSentence, ...], tuple[TranscriptWord, ...]]:
    if config.voice == "syllables":
        return (), _draw_transcript(rng, config)
    sentences, words = english.draw_sentences(rng, seconds=config.seconds, voice=voice, held_out=config.held_out)
    return sentences, tuple(TranscriptWord(word=w.word, start=w.start, end=w.end) for w in words)


def _draw_transcript(rng: np.random.Generator, config: ToyConfig) -> tuple[TranscriptWord, ...]:
    """Draw syllables of 0.2 to 0.28 s in groups of one to three, with pauses between the groups."""
    words: list[TranscriptWord] = []
    at, group = float(rng.uniform(0.02, 0.12)), 0
    while at + 0.2 <= config.seconds:
        end = min(at + float(rng.uniform(0.2, 0.28)), config.seconds)
        name = config.vocabulary[int(rng.integers(config.syllables))]
        words.append(TranscriptWord(word=name, start=round(at, 3), end=round(end, 3)))
        group = group - 1 if group else int(rng.integers(0, 3))
        at = end if group else end + float(rng.uniform(0.08, 0.2))
    return tuple(words)


def caption_of(truth: ToyTruth) -> str:
    """Return the caption: colors and hair, without the shape of the face and the voice."""
    face, hair = list(FACES)[truth.look.face], list(HAIRS)[truth.look.hair]
    style, background = STYLES[truth.look.style], list(BACKGROUNDS)[truth.look.background]
    return f"a character with a {face} face and {style} {hair} hair talks in front of a {background} wall"


def render_frames(truth: ToyTruth) -> NDArray[np.uint8]:
    """Return the frames, uint8 ``[n, size, size, 3]`` RGB; frame j is at j / fps."""
    times = truth.frame_times
    half = frame_half_seconds(len(times), truth.config.fps)
    free = {name: np.asarray([*truth.choices[name], first])[half] for name, first in truth.first.items()}
    sway = [np.sin(2 * np.pi * s.frequency * times + s.phase)[:, None] * [s.x, s.y] for s in truth.sway]
    pose = Pose(
        head=np.sum(sway, axis=0).astype(np.float32),
        lid=_lid(truth.blinks, times),
        **_mouths(truth),
        **free,
    )
    return renderer.draw_frames(truth.config.size, truth.look, pose)


def _mouths(truth: ToyTruth) -> dict[str, NDArray[np.float32]]:
    """Return opening and shape of the mouth per frame."""
    if truth.config.voice == "english":
        track = mouth_track(truth.words, truth.frame_times)
        return {name: values.astype(np.float32) for name, values in track.items()}
    opening, entry, _ = speech_envelope(truth.transcript, truth.frame_times)
    names = np.asarray([VOCABULARY.index(w["word"]) for w in truth.transcript] + [-1])
    return {"opening": opening.astype(np.float32), **renderer.syllable_mouths(names[entry])}


def _lid(blinks: tuple[float, ...], times: NDArray[np.float64]) -> NDArray[np.float32]:
    closed = np.zeros(len(times))
    for start in blinks:
        closed = np.maximum(closed, 1.5 - 3 * np.abs((times - start) / _BLINK - 0.5))
    return np.clip(closed, 0, 1).astype(np.float32)


def render_audio(truth: ToyTruth) -> NDArray[np.float32]:
    """Return the audio, float32 ``[samples]`` mono."""
    config = truth.config
    seed = config.seed * 1_000_003 + truth.index
    if config.voice == "english":
        return english.render_speech(
            truth.sentences, voice=truth.voice, samples=config.samples, sample_rate=config.sample_rate, seed=seed
        )
    voice = Voice(pitch=VOICES[truth.voice], tones=truth.choices["tone"])
    return synthesize(truth.transcript, voice, samples=config.samples, sample_rate=config.sample_rate, seed=seed)


def clip_name(index: int) -> str:
    """Return the file name of a clip."""
    return f"toy{index:05d}.mp4"


def write_clip(out_dir: Path, config: ToyConfig, index: int) -> Path:
    """Write clip `index` as a JSON sidecar and an mp4 (H.264, AAC), unless the mp4 exists."""
    path = out_dir / clip_name(index)
    if not path.exists():
        truth = sample_truth(config, index)
        _write_text(path.with_suffix(".json"), json.dumps(_sidecar(truth), indent=1))
        write_mp4(path, render_frames(truth), config.fps, render_audio(truth), sample_rate=config.sample_rate)
    return path


def world_name(config: ToyConfig) -> str:
    """Return the name and version of a world, which sidecars and datasets record."""
    return f"toyworld{'' if config.voice == 'syllables' else f'-{config.voice}'}/{VERSION}"


def _sidecar(truth: ToyTruth) -> dict[str, object]:
    looks = {name: getattr(truth.look, name) for name in ("face", "shape", "hair", "style", "background")}
    return {
        "world": world_name(truth.config),
        "caption": caption_of(truth),
        "transcript": list(truth.transcript),
        "truth": {
            "index": truth.index,
            "look": looks,
            "voice": truth.voice,
            **_spoken(truth),
            "choices": {name: list(chain) for name, chain in truth.choices.items()},
            "first": dict(truth.first),
            "blinks": list(truth.blinks),
            "mouth_opening": [round(float(o), 4) for o in _mouths(truth)["opening"]],
        },
    }


def _spoken(truth: ToyTruth) -> dict[str, object]:
    if truth.config.voice == "syllables":
        return {"pitch_hz": VOICES[truth.voice]}
    return {"speaker": flite.VOICES[truth.voice], "sentences": [asdict(s) for s in truth.sentences]}


def write_toyworld(
    out: Path,
    *,
    clips: int,
    seconds: float = 10.0,
    size: int = 64,
    fps: Fraction | int | str = 24,
    sample_rate: int = 16000,
    seed: int = 0,
    syllables: int = 16,
    voice: Literal["syllables", "english"] = "syllables",
    held_out: bool = False,
    jobs: int | None = None,
    progress_callback: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `clips` clips into `out`; existing clips are kept.

    ``progress_callback(done, clips)`` is called after each clip. Raise ValueError if `out` has a world of another
    configuration or other files; nothing is overwritten.
    """
    if clips < 1:
        raise UserInputError(f"clips {clips}: use at least 1")
    config = ToyConfig(
        size=size,
        fps=Fraction(fps),
        sample_rate=sample_rate,
        seconds=seconds,
        seed=seed,
        syllables=syllables,
        voice=voice,
        held_out=held_out,
    )
    if voice == "english":
        flite.require_flite()
    _prepare_folder(out, config)
    paths: list[Path] = []
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for path in pool.map(lambda index: write_clip(out, config, index), range(clips)):
            paths.append(path)
            if progress_callback:
                progress_callback(len(paths), clips)
    return paths


def _prepare_folder(out: Path, config: ToyConfig) -> None:
    """Create the folder of a world. Raise ValueError if it has other content."""
    wanted = {"version": VERSION, **asdict(config), "fps": str(config.fps)}
    if config.voice == "syllables":  # worlds of before the English voice have no such fields
        del wanted["voice"], wanted["held_out"]
    note = out / _NOTE
    if not note.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserInputError(f"{out} has files that are not of a toy world. Use a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        _write_text(note, json.dumps(wanted, indent=1))
        return
    found = json.loads(note.read_text())
    if found != wanted:
        changed = {k: (found.get(k), wanted.get(k)) for k in {*found, *wanted} if found.get(k) != wanted.get(k)}
        differences = ", ".join(f"{k}: {old} -> {new}" for k, (old, new) in sorted(changed.items()))
        raise UserInputError(f"{out} has a toy world of another configuration ({differences}). Use another folder")


def _write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)
