"""``mfctl generate``: stream chunks from a checkpoint into an mp4 with picture and sound."""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mfcore.steps import Mode
from mfcore.types import AUDIO, VIDEO, Condition, Stream
from preprocessing.media import MediaError, decode, probe
from preprocessing.mp4 import Mp4Writer
from preprocessing.record import Word
from preprocessing.source import parse_words
from preprocessing.subtitles import parse_subtitles
from workflows.checkpoint import Weights
from workflows.precision import Precision
from workflows.streamer import Sampling, Streamer

SYLLABLES_PER_SECOND = 4.5  # an unhurried speaker
SUBTITLES = (".srt", ".vtt")
PAUSE = 0.1  # seconds between words whose times are allotted
MULTI_STEPS = 50
GUIDANCE = 1.5  # of the multi-step mode
FEW_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Portion:
    """What a chunk adds to the file: signals that have become final."""

    signals: dict[str, Tensor]
    seconds: float  # time that sampling and decoding took


def generate(
    checkpoint: str,
    *,
    out: str,
    first_frame: str | None = None,
    transcript: str | None = None,
    caption: str = "",
    voice: str | None = None,
    seconds: float = 10.0,
    steps: int | None = None,
    mode: Mode | None = None,
    guidance: float | None = None,
    trust: float | None = None,
    seed: int = 0,
    weights: Weights = "ema",
    precision: Precision | None = None,
    compile: bool = False,
    graphs: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``out`` and say what it holds. ValueError for anything the user can put right; then nothing is written.

    ``precision``: default bf16 on a GPU, fp32 on a CPU.
    """
    target = Path(out)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"{target}: the result is an mp4, give it a name that ends in .mp4")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another name, or add --overwrite")
    if not 0 < seconds < inf:
        raise ValueError(f"--seconds {seconds}: a clip needs a positive length, and an end")
    streamer = Streamer.load(checkpoint, weights, precision)
    streamer.switch(compile=compile, graphs=graphs)
    how = sampling(streamer.card.stage, mode=mode, steps=steps, guidance=guidance, trust=trust, seed=seed)
    words, allotted = read_transcript(transcript)
    cond = streamer.condition(
        caption=caption,
        transcript=words,
        first_frame=read_first_frame(first_frame, streamer) if VIDEO in streamer.codecs else None,
        voice=read_voice(voice, streamer) if voice is not None and AUDIO in streamer.codecs else None,
    )
    if late := [word.word for word in words if word.start >= seconds]:
        said = f"{len(late)} of {len(words)} words begin after the end of the clip, at {seconds:g} s: {' '.join(late)}"
        print(f"warning: {said:.300}; give more --seconds", file=sys.stderr, flush=True)
    if doubt := streamer.card.doubt(how.mode, how.steps):
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = write_stream(streamer, cond, ceil(seconds / float(streamer.card.chunk_seconds)), how, target)
    made = {"mode": how.mode, "steps": how.steps, "nfe": how.nfe, "precision": streamer.precision}
    return {"path": str(target), **facts, **made} | (
        {"word_times": "allotted from the speaking rate", "transcript": [vars(w) for w in words]} if allotted else {}
    )


def sampling(
    stage: str, *, mode: Mode | None, steps: int | None, guidance: float | None, trust: float | None, seed: int
) -> Sampling:
    """Defaults by stage: only the mutual stage has trained the few-step mode. ValueError for fewer than one step."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps {steps}: a chunk needs at least 1 solver step")
    mode = mode or ("few" if stage == "mutual" else "multi")
    return Sampling(
        mode=mode,
        steps=steps or (FEW_STEPS if mode == "few" else MULTI_STEPS),
        guidance=guidance if guidance is not None else (1.0 if mode == "few" else GUIDANCE),
        trust=trust,
        seed=seed,
    )


def portions(streamer: Streamer, cond: Condition, chunks: int, how: Sampling) -> Iterator[Portion]:
    """Signals of one row, chunk by chunk; together they equal decoding the whole."""
    decoders = {m: codec.decoder() for m, codec in streamer.codecs.items()}
    began = time.perf_counter()
    pending = {VIDEO: decoders[VIDEO].push(streamer.first_latents(cond, 0))} if VIDEO in decoders else {}
    for chunk in streamer.stream(cond, chunks, how, samples=torch.zeros(1, dtype=torch.long)):
        signals = _push(streamer, decoders, chunk, pending)
        pending = {}
        yield Portion(signals=signals, seconds=time.perf_counter() - began)
        began = time.perf_counter()
    rest = {m: d.flush() for m, d in decoders.items()}
    yield Portion(signals=rest, seconds=time.perf_counter() - began)


def _push(
    streamer: Streamer, decoders: Mapping[str, Any], chunk: Mapping[str, Stream], pending: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    new = {m: decoders[m].push(streamer.raw(m, chunk[m].latents[0])) for m in chunk}
    return {m: torch.cat([pending[m], x]) if m in pending else x for m, x in new.items()}


def write_stream(streamer: Streamer, cond: Condition, chunks: int, how: Sampling, target: Path) -> dict[str, Any]:
    """Stream row 0 of ``cond`` into an mp4."""
    picture, sound = VIDEO in streamer.codecs, AUDIO in streamer.codecs
    length = chunks * streamer.card.chunk_seconds + (Fraction(1) / streamer.fps if picture else 0)
    left = int(length * streamer.sample_rate) if sound else 0
    frames, times = 0, []
    with Mp4Writer(
        target,
        fps=streamer.fps if picture else None,
        size=streamer.frame_size if picture else None,
        sample_rate=streamer.sample_rate if sound else None,
    ) as writer:
        for portion in portions(streamer, cond, chunks, how):
            times.append(portion.seconds)
            if picture:
                frames += len(portion.signals[VIDEO])
                writer.push_frames(portion.signals[VIDEO].numpy())
            if sound:
                samples = portion.signals[AUDIO][:left].numpy()  # the last latent may reach beyond the last frame
                left -= len(samples)
                writer.push_samples(samples.astype(np.float32))
    return {
        "seconds": float(length),
        "frames": frames,
        "fps": float(streamer.fps) if picture else None,
        "first_chunk_s": round(times[0], 4),
        "seconds_per_second": round(float(length) / sum(times), 3),
    }


def read_first_frame(path: str | None, streamer: Streamer) -> Tensor | None:
    """An image, or the first frame of a video, scaled to cover the model's picture and cut to its centre."""
    if path is None:
        return None
    place, (height, width) = Path(path), streamer.frame_size
    if not place.exists():
        raise ValueError(f"--first-frame {path} does not exist")
    try:
        with Image.open(place) as image:
            picture = image.convert("RGB")
    except UnidentifiedImageError:
        return _first_of_video(path, streamer)
    scale = max(height / picture.height, width / picture.width)
    size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture = picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(picture).copy())


def _first_of_video(path: str, streamer: Streamer) -> Tensor:
    try:
        frames, _ = decode(path, start=0.0, end=1.0, fps=streamer.fps, size=streamer.frame_size, sample_rate=16000)
    except MediaError as error:
        raise ValueError(f"--first-frame {path} is neither an image nor a video: {error}") from None
    if frames is None or not len(frames):
        raise ValueError(f"--first-frame {path} holds no picture")
    return torch.from_numpy(frames[0].copy())


def read_voice(path: str, streamer: Streamer) -> Tensor:
    """The sound of a media file, at most its first 30 seconds."""
    if not Path(path).exists():
        raise ValueError(f"--voice {path} does not exist")
    try:
        if probe(path).audio is None:
            raise ValueError(f"--voice {path} has no sound")
        _, sound = decode(path, start=0.0, end=30.0, fps=Fraction(8), size=(16, 16), sample_rate=streamer.sample_rate)
    except MediaError as error:
        raise ValueError(f"--voice {path} cannot be read: {error}") from None
    if sound is None:
        raise ValueError(f"--voice {path} has no sound")
    return torch.from_numpy(sound.copy())


def read_transcript(given: str | None) -> tuple[list[Word], bool]:
    """Words with times, and whether the times were allotted: a JSON file or list, subtitles, a text file, or the text
    itself."""
    if not given:
        return [], False
    suffix, here = Path(given[-8:]).suffix.lower(), _is_file(given)
    if suffix in (".json", ".txt", *SUBTITLES) and not here and not any(c.isspace() for c in given):
        raise ValueError(f"--transcript {given} does not exist")
    if here and suffix in SUBTITLES:
        try:
            return list(parse_subtitles(Path(given).read_bytes())), False
        except ValueError as error:
            raise ValueError(f"--transcript {given}: {error}") from None
    try:
        text = Path(given).read_text() if here else given
    except UnicodeDecodeError:
        raise ValueError(f"--transcript {given} is no text") from None
    if suffix == ".json" or re.match(r"""\s*(\[\s*(\{|\])|\{\s*")""", text):
        return _from_json(text), False
    return allot(text.split()), True


def _from_json(text: str) -> list[Word]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the transcript is not JSON: {error}") from None
    if isinstance(value, dict):
        if "transcript" not in value:
            raise ValueError("--transcript: a JSON object has its words under `transcript`, as a list")
        value = value["transcript"]
    words = list(parse_words(value, "--transcript") or ())
    for word in words:
        if not -inf < word.start <= word.end < inf:
            raise ValueError(f"--transcript: the word {word.word!r} goes from {word.start:g} s to {word.end:g} s")
    return words


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # a text too long to be a name
        return False


def allot(words: Sequence[str]) -> list[Word]:
    """Times from a speaking rate of ``SYLLABLES_PER_SECOND``, a syllable being a run of vowels."""
    out: list[Word] = []
    at = 0.0
    for word in words:
        if not any(c.isalnum() for c in word):  # a dash is not said
            continue
        length = max(1, len(re.findall(r"[aeiouy]+", word.lower()))) / SYLLABLES_PER_SECOND
        out.append(Word(word=word, start=round(at, 3), end=round(at + length, 3)))
        at += length + PAUSE
    return out
