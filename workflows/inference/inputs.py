import json
import re
from collections.abc import Sequence
from fractions import Fraction
from math import inf
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from preprocessing.media.decoder import decode_range
from preprocessing.media.probe import MediaError, probe
from preprocessing.records import Word
from preprocessing.sources.discovery import parse_transcript
from preprocessing.sources.subtitles import parse_subtitles
from workflows.inference.pipeline import StreamingPipeline

SYLLABLES_PER_SECOND = 4.5  # an unhurried speaker
SUBTITLE_SUFFIXES = (".srt", ".vtt")
PAUSE_SECONDS = 0.1  # seconds between words whose times are allotted


def read_first_frame(path: str | None, streamer: StreamingPipeline) -> Tensor | None:
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


def _first_of_video(path: str, streamer: StreamingPipeline) -> Tensor:
    try:
        frames, _ = decode_range(
            path, start=0.0, end=1.0, fps=streamer.fps, size=streamer.frame_size, sample_rate=16000
        )
    except MediaError as error:
        raise ValueError(f"--first-frame {path} is neither an image nor a video: {error}") from None
    if frames is None or not len(frames):
        raise ValueError(f"--first-frame {path} holds no picture")
    return torch.from_numpy(frames[0].copy())


def read_voice(path: str, streamer: StreamingPipeline) -> Tensor:
    """The sound of a media file, at most its first 30 seconds."""
    if not Path(path).exists():
        raise ValueError(f"--voice {path} does not exist")
    try:
        if probe(path).audio is None:
            raise ValueError(f"--voice {path} has no sound")
        _, sound = decode_range(
            path, start=0.0, end=30.0, fps=Fraction(8), size=(16, 16), sample_rate=streamer.sample_rate
        )
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
    if suffix in (".json", ".txt", *SUBTITLE_SUFFIXES) and not here and not any(c.isspace() for c in given):
        raise ValueError(f"--transcript {given} does not exist")
    if here and suffix in SUBTITLE_SUFFIXES:
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
    return estimate_word_times(text.split()), True


def _from_json(text: str) -> list[Word]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the transcript is not JSON: {error}") from None
    if isinstance(value, dict):
        if "transcript" not in value:
            raise ValueError("--transcript: a JSON object has its words under `transcript`, as a list")
        value = value["transcript"]
    words = list(parse_transcript(value, "--transcript") or ())
    for word in words:
        if not -inf < word.start <= word.end < inf:
            raise ValueError(f"--transcript: the word {word.word!r} goes from {word.start:g} s to {word.end:g} s")
    return words


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # a text too long to be a name
        return False


def estimate_word_times(words: Sequence[str]) -> list[Word]:
    """Times from a speaking rate of ``SYLLABLES_PER_SECOND``, a syllable being a run of vowels."""
    out: list[Word] = []
    at = 0.0
    for word in words:
        if not any(c.isalnum() for c in word):  # a dash is not said
            continue
        length = max(1, len(re.findall(r"[aeiouy]+", word.lower()))) / SYLLABLES_PER_SECOND
        out.append(Word(word=word, start=round(at, 3), end=round(at + length, 3)))
        at += length + PAUSE_SECONDS
    return out
