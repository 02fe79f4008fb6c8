"""A world of talking characters whose truth is known: real mp4 files with captions, transcripts and free choices.

A clip is a pure function of (configuration, seed, index). The caption names the colours of face, hair and background,
the transcript fixes every syllable and its times, the first frame fixes how the character looks; the voice is drawn.
What no condition fixes are the *free choices*: per half second a gaze, eyebrows, a hand, a light and a tone of voice.
Hand and light persist (they stay with probability 0.7), so history matters.

Half second k of the picture holds in (0.5 k, 0.5 (k + 1)], of the sound in [0.5 k, 0.5 (k + 1)): the first frame then
belongs to what came before the clip, as it does when a window is cut out of a longer clip, and with 24 frames a second
and a codec that takes the first frame alone and then groups of four, no group straddles a choice.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from preprocessing.media.mp4_writer import write_mp4
from preprocessing.toyworld import renderer
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
"""Free choice -> number of its modes."""
PERSISTENT = {"hand", "light"}
STAY_PROBABILITY = 0.7  # probability that a persistent choice stays for another half second
VERSION = 1  # of the world: clips of different versions differ for the same seed
_NOTE = "_toyworld.json"
_BLINK = 0.14  # seconds


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """What a world looks and sounds like. ``fps`` may be given as anything that ``Fraction`` takes."""

    size: int = 64  # side of the square picture, pixels; even
    fps: Fraction = Fraction(24)
    sample_rate: int = 16000  # Hz
    seconds: float = 10.0
    seed: int = 0
    syllables: int = 16  # size of the vocabulary

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", Fraction(self.fps))
        if not (32 <= self.size <= 512) or self.size % 2:
            raise ValueError(f"size {self.size}: the toy world draws even sizes from 32 to 512 pixels")
        if self.fps < 8 or self.fps > 120:
            raise ValueError(f"fps {self.fps}: choose 8 to 120, a syllable lasts a fifth of a second")
        if self.sample_rate < MIN_SAMPLE_RATE:
            raise ValueError(f"sample_rate {self.sample_rate}: the toy voice needs at least {MIN_SAMPLE_RATE} Hz")
        if not 1 <= self.seconds <= 3600:
            raise ValueError(f"seconds {self.seconds}: choose 1 to 3600 per clip")
        if not 12 <= self.syllables <= len(VOCABULARY):
            raise ValueError(f"syllables {self.syllables}: choose 12 to {len(VOCABULARY)}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return VOCABULARY[: self.syllables]

    @property
    def frames(self) -> int:
        """All frames up to and including the end: a codec that takes the first one alone gets whole groups."""
        return floor(Fraction(self.seconds).limit_denominator(1000) * self.fps) + 1

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate)

    @property
    def half_seconds(self) -> int:
        return ceil(self.seconds / HALF_SECOND)


@dataclass(frozen=True, kw_only=True)
class ToyTruth:
    """Everything that is to be known about one clip."""

    config: ToyConfig
    index: int
    look: Appearance
    voice: int  # position in VOICES
    transcript: tuple[TranscriptWord, ...]
    choices: Mapping[str, tuple[int, ...]]  # per half second
    first: Mapping[str, int]  # the choices that the first frame shows
    blinks: tuple[float, ...]  # seconds at which they start
    sway: tuple[tuple[float, float, float, float], ...]  # (x, y amplitude in units, frequency in Hz, phase)

    @property
    def frame_times(self) -> NDArray[np.float64]:
        return np.arange(self.config.frames) / float(self.config.fps)


def frame_half_seconds(frames: int, fps: Fraction) -> NDArray[np.int64]:
    """The half second to which each frame belongs; -1 for the first frame."""
    return np.asarray([ceil(j / fps / HALF_SECOND) - 1 for j in range(frames)], np.int64)


def sample_truth(config: ToyConfig, index: int) -> ToyTruth:
    """Clip ``index`` of the world: a pure function of (configuration, index)."""
    rng = np.random.default_rng([config.seed, index])
    tables = {"face": FACES, "shape": SHAPES, "hair": HAIRS, "style": STYLES, "background": BACKGROUNDS}
    look = Appearance(**{name: int(rng.integers(len(table))) for name, table in tables.items()})
    chains = {name: _chain(rng, modes, config.half_seconds + 1, name in PERSISTENT) for name, modes in CHOICES.items()}
    return ToyTruth(
        config=config,
        index=index,
        look=look,
        voice=int(rng.integers(len(VOICES))),
        transcript=_draw_transcript(rng, config),
        choices={name: chain[1:] for name, chain in chains.items()},
        first={name: chain[0] for name, chain in chains.items() if name != "tone"},
        blinks=tuple(
            float(k * HALF_SECOND) + float(rng.uniform(0.1, 0.3))
            for k in range(config.half_seconds)
            if rng.random() < 0.25
        ),
        sway=tuple(
            (float(a * rng.uniform(0.6, 1)), float(a * rng.uniform(0.4, 0.8)), float(f), float(rng.uniform(0, 6.28)))
            for a, f in ((1.5, rng.uniform(0.12, 0.2)), (0.6, rng.uniform(0.25, 0.4)))
        ),
    )


def _chain(rng: np.random.Generator, modes: int, length: int, persistent: bool) -> tuple[int, ...]:
    """Independent draws, or a chain that stays with probability STAY and else goes to one of the other modes."""
    chain = [int(rng.integers(modes))]
    while len(chain) < length:
        if not persistent:
            chain.append(int(rng.integers(modes)))
        elif rng.random() < STAY_PROBABILITY:
            chain.append(chain[-1])
        else:
            chain.append((chain[-1] + int(rng.integers(1, modes))) % modes)
    return tuple(chain)


def _draw_transcript(rng: np.random.Generator, config: ToyConfig) -> tuple[TranscriptWord, ...]:
    """Syllables of 0.2 to 0.28 s in groups of one to three, with pauses between the groups."""
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
    """What the caption condition says: colours and hair; not the shape of the face, not the voice."""
    face, hair = list(FACES)[truth.look.face], list(HAIRS)[truth.look.hair]
    style, background = STYLES[truth.look.style], list(BACKGROUNDS)[truth.look.background]
    return f"a character with a {face} face and {style} {hair} hair talks in front of a {background} wall"


def render_frames(truth: ToyTruth) -> NDArray[np.uint8]:
    """The picture, uint8 ``[n, size, size, 3]`` RGB; frame j shows the world at j / fps."""
    times = truth.frame_times
    opening, entry, _ = speech_envelope(truth.transcript, times)
    names = np.asarray([VOCABULARY.index(w["word"]) for w in truth.transcript] + [-1])
    half = frame_half_seconds(len(times), truth.config.fps)
    free = {name: np.asarray([*truth.choices[name], first])[half] for name, first in truth.first.items()}
    sway = [np.sin(2 * np.pi * f * times + phase)[:, None] * [ax, ay] for ax, ay, f, phase in truth.sway]
    pose = Pose(
        head=np.sum(sway, axis=0).astype(np.float32),
        lid=_lid(truth.blinks, times),
        opening=opening.astype(np.float32),
        syllable=names[entry],
        **free,
    )
    return renderer.draw_frames(truth.config.size, truth.look, pose)


def _lid(blinks: tuple[float, ...], times: NDArray[np.float64]) -> NDArray[np.float32]:
    closed = np.zeros(len(times))
    for start in blinks:
        closed = np.maximum(closed, 1.5 - 3 * np.abs((times - start) / _BLINK - 0.5))
    return np.clip(closed, 0, 1).astype(np.float32)


def render_audio(truth: ToyTruth) -> NDArray[np.float32]:
    """The sound, float32 ``[samples]`` mono."""
    config = truth.config
    voice = Voice(pitch=VOICES[truth.voice], tones=truth.choices["tone"])
    seed = config.seed * 1_000_003 + truth.index
    return synthesize(truth.transcript, voice, samples=config.samples, sample_rate=config.sample_rate, seed=seed)


def clip_name(index: int) -> str:
    return f"toy{index:05d}.mp4"


def write_clip(out_dir: Path, config: ToyConfig, index: int) -> Path:
    """Write clip ``index`` as mp4 (H.264, AAC) after its JSON sidecar, unless the mp4 is there already."""
    path = out_dir / clip_name(index)
    if not path.exists():
        truth = sample_truth(config, index)
        _put(path.with_suffix(".json"), json.dumps(_sidecar(truth), indent=1))
        write_mp4(path, render_frames(truth), config.fps, render_audio(truth), sample_rate=config.sample_rate)
    return path


def _sidecar(truth: ToyTruth) -> dict[str, object]:
    opening, _, _ = speech_envelope(truth.transcript, truth.frame_times)
    looks = {name: getattr(truth.look, name) for name in ("face", "shape", "hair", "style", "background")}
    return {
        "caption": caption_of(truth),
        "transcript": list(truth.transcript),
        "truth": {
            "index": truth.index,
            "look": looks,
            "voice": truth.voice,
            "pitch_hz": VOICES[truth.voice],
            "choices": {name: list(chain) for name, chain in truth.choices.items()},
            "first": dict(truth.first),
            "blinks": list(truth.blinks),
            "mouth_opening": [round(float(o), 4) for o in opening],
        },
    }


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
    jobs: int | None = None,
    progress_callback: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write ``clips`` clips into ``out``; those that are there already are left as they are.

    ``progress_callback(done, clips)`` is called after each clip. Raises ``ValueError`` when ``out`` holds a world of
    another configuration, or other things: nothing is ever overwritten.
    """
    if clips < 1:
        raise ValueError(f"clips {clips}: choose at least 1")
    config = ToyConfig(
        size=size, fps=Fraction(fps), sample_rate=sample_rate, seconds=seconds, seed=seed, syllables=syllables
    )
    _claim(out, config)
    paths: list[Path] = []
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for path in pool.map(lambda index: write_clip(out, config, index), range(clips)):
            paths.append(path)
            if progress_callback:
                progress_callback(len(paths), clips)
    return paths


def _claim(out: Path, config: ToyConfig) -> None:
    """Make ``out`` the folder of this world, or refuse."""
    wanted = {"version": VERSION, **asdict(config), "fps": str(config.fps)}
    note = out / _NOTE
    if not note.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} holds something else than a toy world: choose a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        _put(note, json.dumps(wanted, indent=1))
        return
    found = json.loads(note.read_text())
    if found != wanted:
        changed = {k: (found.get(k), wanted.get(k)) for k in {*found, *wanted} if found.get(k) != wanted.get(k)}
        words = ", ".join(f"{k} {old} there, {new} wanted" for k, (old, new) in sorted(changed.items()))
        raise ValueError(f"{out} holds a toy world of another configuration ({words}): choose another folder")


def _put(path: Path, text: str) -> None:
    """Write a small file in one step, so that it is either absent or whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)
