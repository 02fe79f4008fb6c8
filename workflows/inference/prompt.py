"""Conditions and length of a clip, from files, text or arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mfcore.errors import UserInputError, check_range
from mfcore.types import AUDIO, Condition
from preprocessing.records import Word
from preprocessing.speech.frontend import phonemes_of_words
from workflows.inference.inputs import fit_frame, read_or_draw_first_frame, read_transcript, read_voice
from workflows.inference.latents import LatentPipeline

FrameSource = str | Path | Image.Image | NDArray[np.uint8] | Tensor
"""File with an image or video, or pixels uint8 (H, W, 3)."""
VoiceSource = str | Path | NDArray[np.float32] | Tensor
"""Media file, or mono samples float32 (n,) at the sample rate of the pipeline."""
TranscriptSource = str | Path | Sequence[Word]
"""Text, a file, or words with times in seconds."""

MAX_SECONDS = 86_400  # of a clip
DEFAULT_SECONDS = 10.0  # of a clip without a transcript
TAIL_SECONDS = 0.4  # after the last word


@dataclass(frozen=True, kw_only=True)
class ClipPrompt:
    """Conditions and length of a clip, as given on the command line."""

    first_frame: str | None = None  # image or video
    transcript: str | None = None  # text, JSON, or a file of either kind
    caption: str = ""
    voice: str | None = None  # media file with the reference voice
    seconds: float | None = None  # None: that of the transcript, DEFAULT_SECONDS without one
    speed: float = 1.0  # factor on the rate of speech of a text without times
    pauses: float = 1.0  # factor on its pauses


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """Encoded conditions of one clip, and its length."""

    cond: Condition
    words: list[Word]
    estimated: bool  # the times of the words
    seconds: float
    chunks: int


def encode_prompt(
    pipeline: LatentPipeline,
    *,
    first_frame: FrameSource | None = None,
    transcript: TranscriptSource | None = None,
    caption: str = "",
    voice: VoiceSource | None = None,
    seconds: float | None = None,
    speed: float = 1.0,
    pauses: float = 1.0,
    seed: int = 0,
) -> EncodedPrompt:
    """Return the conditions and the length of a clip; see ``ClipPrompt``. ``seed`` chooses a drawn first frame.

    Raises UserInputError for wrong input.
    """
    check_range("--seconds", seconds, 0, MAX_SECONDS, above=True)
    words, estimated = _words(pipeline, transcript, speed=speed, pauses=pauses)
    length = seconds or (max(w.end for w in words) + TAIL_SECONDS if words else DEFAULT_SECONDS)
    check_range("length of the transcript in seconds", length, 0, MAX_SECONDS, above=True)
    if first_frame is None or isinstance(first_frame, str | Path):
        frame, drawn = read_or_draw_first_frame(None if first_frame is None else str(first_frame), pipeline, seed)
    else:
        frame, drawn = _frame_of_pixels(pipeline, first_frame), ""
    cond = pipeline.encode_conditions(
        caption=caption or drawn,
        transcript=words,
        first_frame=frame,
        voice=_samples(pipeline, voice) if voice is not None and AUDIO in pipeline.codecs else None,
    )
    chunks = ceil(length / float(pipeline.metadata.chunk_seconds))
    return EncodedPrompt(cond=cond, words=words, estimated=estimated, seconds=length, chunks=chunks)


def _words(
    pipeline: LatentPipeline, transcript: TranscriptSource | None, *, speed: float, pauses: float
) -> tuple[list[Word], bool]:
    kind = pipeline.metadata.transcript
    if transcript is None or isinstance(transcript, str | Path):
        return read_transcript(None if transcript is None else str(transcript), kind, speed=speed, pauses=pauses)
    words = list(transcript)
    return (phonemes_of_words(words) if kind == "phonemes" else words), False


def _frame_of_pixels(pipeline: LatentPipeline, frame: Image.Image | NDArray[np.uint8] | Tensor) -> Tensor:
    """Return pixels scaled and cropped to the frame size."""
    if not isinstance(frame, Image.Image):
        pixels = np.asarray(frame)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise UserInputError(
                f"first_frame: got {pixels.dtype} of shape {pixels.shape}. Give uint8 of shape (height, width, 3)."
            )
        frame = Image.fromarray(pixels)
    return fit_frame(frame.convert("RGB"), pipeline.frame_size)


def _samples(pipeline: LatentPipeline, voice: VoiceSource) -> Tensor:
    if isinstance(voice, str | Path):
        return read_voice(str(voice), pipeline)
    samples = torch.as_tensor(voice)
    if samples.ndim != 1 or samples.dtype != torch.float32:
        raise UserInputError(
            f"voice: got {samples.dtype} of shape {tuple(samples.shape)}. Give mono samples, float32 of shape (n,), "
            f"at {pipeline.sample_rate} Hz."
        )
    return samples
