"""Read first frame, voice and transcript of a clip from files or text."""

import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mfcore.errors import UserInputError, check_range
from mfcore.types import VIDEO
from preprocessing.media.decoder import decode_range
from preprocessing.media.probe import MediaError, probe
from preprocessing.records import Word
from preprocessing.sources.discovery import parse_transcript
from preprocessing.sources.subtitles import parse_subtitles
from preprocessing.speech.frontend import phonemes_of_text, phonemes_of_words
from preprocessing.toyworld.first_frame import MAX_DISTANCE, character_distance, draw_first_frame, world_config
from workflows.inference.latents import LatentPipeline

SYLLABLES_PER_SECOND = 4.5  # a slow speaker
SUBTITLE_SUFFIXES = (".srt", ".vtt")
PAUSE_SECONDS = 0.1  # seconds between words with estimated times


def read_or_draw_first_frame(path: str | None, pipeline: LatentPipeline, seed: int) -> tuple[Tensor | None, str]:
    """Return the first frame and a caption of it; without a path, a network of a toy world gets a drawn character.

    The caption is empty for a frame that was not drawn. A network without video gets no frame.
    """
    if VIDEO not in pipeline.codecs:
        return None, ""
    config = world_config(pipeline.metadata.world, size=pipeline.frame_size[0], seed=seed)
    if path is not None or config is None or pipeline.frame_size[0] != pipeline.frame_size[1]:
        return read_first_frame(path, pipeline), ""
    drawn = draw_first_frame(config)
    return torch.from_numpy(drawn.pixels.copy()), drawn.caption


def read_first_frame(path: str | None, pipeline: LatentPipeline) -> Tensor | None:
    """Read an image or the first frame of a video, scaled and center-cropped to the frame size.

    Raises UserInputError for a file without a picture, and for a picture without a character of the toy world if the
    network was trained there.
    """
    if path is None:
        return None
    frame = _read_frame(path, pipeline)
    if world_config(pipeline.metadata.world) is not None:
        _check_character(path, frame)
    return frame


def _check_character(path: str, frame: Tensor) -> None:
    """Raise UserInputError for a frame without a character of the toy world."""
    height, width = frame.shape[:2]
    if height != width or character_distance(frame.numpy()) <= MAX_DISTANCE:
        return
    raise UserInputError(
        f"--first-frame {path}: the picture shows no character of the toy world. The model animates such characters "
        f"only, in square pictures that are scaled to {width} x {height} pixels. Omit --first-frame to draw one, or "
        "use a clip of `mfctl toyworld`."
    )


def _read_frame(path: str, pipeline: LatentPipeline) -> Tensor:
    file, (height, width) = Path(path), pipeline.frame_size
    if not file.exists():
        raise UserInputError(f"--first-frame {path}: no such file")
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
    except UnidentifiedImageError:
        return _read_first_video_frame(path, pipeline)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # cut, damaged or absurdly large
        raise UserInputError(f"--first-frame {path} cannot be read: {error}. Use an intact image.") from None
    if image.size != (width, height):
        print(
            f"note: --first-frame {path}: the picture of {image.width} x {image.height} pixels is scaled"
            f" and cropped to {width} x {height}",
            file=sys.stderr,
            flush=True,
        )
    return fit_frame(image, pipeline.frame_size)


def fit_frame(image: Image.Image, frame_size: tuple[int, int]) -> Tensor:
    """Return an RGB image scaled and center-cropped to height and width, uint8 (height, width, 3)."""
    height, width = frame_size
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image).copy())


def _read_first_video_frame(path: str, pipeline: LatentPipeline) -> Tensor:
    try:
        frames, _ = decode_range(
            path, start=0.0, end=1.0, fps=pipeline.fps, size=pipeline.frame_size, sample_rate=16000
        )
    except MediaError as error:
        raise UserInputError(f"--first-frame {path} is neither an image nor a video: {error}") from None
    if frames is None or not len(frames):
        raise UserInputError(f"--first-frame {path} contains no video.")
    return torch.from_numpy(frames[0].copy())


def read_voice(path: str, pipeline: LatentPipeline) -> Tensor:
    """Read at most 30 seconds of audio from a media file."""
    if not Path(path).exists():
        raise UserInputError(f"--voice {path}: no such file")
    try:
        if probe(path).audio is None:
            raise UserInputError(f"--voice {path} has no audio")
        _, sound = decode_range(
            path, start=0.0, end=30.0, fps=Fraction(8), size=(16, 16), sample_rate=pipeline.sample_rate
        )
    except MediaError as error:
        raise UserInputError(f"--voice {path} cannot be read: {error}") from None
    if sound is None:
        raise UserInputError(f"--voice {path} has no audio")
    return torch.from_numpy(sound.copy())


def read_transcript(
    text_or_path: str | None,
    kind: Literal["words", "phonemes"] = "words",
    *,
    speed: float = 1.0,
    pauses: float = 1.0,
) -> tuple[list[Word], bool]:
    """Return the transcript with times, and True if the times are estimated.

    The input is a JSON list, text, or a file with JSON, subtitles or text. With `kind` "phonemes", English words become
    phonemes; the times of text follow the durations of speech. `speed` and `pauses` are factors on the rate of speech
    and on the pauses of text.

    Raises:
        UserInputError: The transcript cannot be read or spoken, or `speed` or `pauses` is out of range or set for a
            transcript with times.
    """
    check_range("--speed", speed, 0.5, 2)
    check_range("--pauses", pauses, 0, 10)
    found = _read_words(text_or_path)
    if isinstance(found, str):
        if kind == "phonemes":
            return phonemes_of_text(found, speed=speed, pause_scale=pauses), True
        return estimate_word_times(found.split(), speed=speed, pauses=pauses), True
    if found and (speed, pauses) != (1.0, 1.0):
        raise UserInputError("--speed and --pauses: the transcript has times. Use a text without times, or omit them.")
    return (phonemes_of_words(found) if kind == "phonemes" else found), False


def _read_words(text_or_path: str | None) -> list[Word] | str:
    """Return words with their times, or text without times."""
    if not text_or_path:
        return []
    suffix, is_file = Path(text_or_path[-8:]).suffix.lower(), _is_file(text_or_path)
    if suffix in (".json", ".txt", *SUBTITLE_SUFFIXES) and not is_file and not any(c.isspace() for c in text_or_path):
        raise UserInputError(f"--transcript {text_or_path}: no such file")
    if is_file and suffix in SUBTITLE_SUFFIXES:
        try:
            return list(parse_subtitles(Path(text_or_path).read_bytes()))
        except ValueError as error:
            raise UserInputError(f"--transcript {text_or_path}: {error}") from None
    try:
        text = Path(text_or_path).read_text() if is_file else text_or_path
    except UnicodeDecodeError:
        raise UserInputError(f"--transcript {text_or_path} is not a text file") from None
    if suffix == ".json" or re.match(r"""\s*(\[\s*(\{|\])|\{\s*")""", text):
        return _parse_json(text)
    return text


def _parse_json(text: str) -> list[Word]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserInputError(f"--transcript is not valid JSON: {error}") from None
    if isinstance(value, dict):
        if "transcript" not in value:
            raise UserInputError("--transcript: a JSON object needs the list of words under `transcript`")
        value = value["transcript"]
    words = list(parse_transcript(value, "--transcript") or ())
    for word in words:
        if not -inf < word.start <= word.end < inf:
            raise UserInputError(
                f"--transcript: the times of {word.word!r} are invalid: {word.start:g} s to {word.end:g} s"
            )
    return words


def _is_file(text_or_path: str) -> bool:
    try:
        return Path(text_or_path).is_file()
    except OSError:  # too long for a file name
        return False


def estimate_word_times(words: Sequence[str], *, speed: float = 1.0, pauses: float = 1.0) -> list[Word]:
    """Estimate times from ``SYLLABLES_PER_SECOND``; a run of vowels is a syllable."""
    timed: list[Word] = []
    start = 0.0
    for word in words:
        if not any(c.isalnum() for c in word):  # such as a dash
            continue
        length = max(1, len(re.findall(r"[aeiouy]+", word.lower()))) / (SYLLABLES_PER_SECOND * speed)
        timed.append(Word(word=word, start=round(start, 3), end=round(start + length, 3)))
        start += length + PAUSE_SECONDS * pauses
    return timed
