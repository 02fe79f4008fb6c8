"""Clips of the Python API: ``pipeline.stream(...)`` yields chunks, ``pipeline(...)`` returns a clip."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np

from mfcore.solver import Mode, SamplerName
from preprocessing.records import Frames, Waveform, Word
from workflows.inference.decoding import ClipFormat, DecodedChunk, decode_clip, write_chunks
from workflows.inference.latents import LatentPipeline
from workflows.inference.prompt import EncodedPrompt, FrameSource, TranscriptSource, VoiceSource, encode_prompt
from workflows.inference.sampling import resolve_sampling_params
from workflows.utils.output_file import check_output_file


class ClipOptions(TypedDict, total=False):
    """Keyword arguments of ``StreamingPipeline.stream`` and of a call of the pipeline; all are optional."""

    caption: str  # of the clip
    first_frame: FrameSource | None  # file or uint8 (H, W, 3); None: drawn, for networks of the toy world
    voice: VoiceSource | None  # file or float32 (n,)
    seconds: float | None  # length of the clip; None: that of the transcript, 10 without one
    speed: float  # factor on the rate of speech of a text
    pauses: float  # factor on the pauses of a text
    mode: Mode | None  # few or multi; None: few for stage mutual
    steps: int | None  # solver steps per chunk; None: 4 in few-step mode, 50 in multi-step mode
    sampler: SamplerName | None  # None: renoise in few-step mode, deterministic in multi-step mode
    guidance: float | None  # weight; None: 1 in few-step mode, 1.5 in multi-step mode
    trust: float | None  # label of the generated history; None: 1 in few-step mode, none in multi-step mode
    seed: int  # of the noise and of a drawn first frame


@dataclass(frozen=True, kw_only=True)
class GeneratedClip:
    """A finished clip."""

    chunks: Sequence[DecodedChunk]
    words: Sequence[Word]  # spoken, with times in seconds
    format: ClipFormat

    @cached_property
    def video(self) -> Frames | None:
        """Frames uint8 (n, H, W, 3); None without video."""
        parts = [chunk.video for chunk in self.chunks if chunk.video is not None]
        return np.concatenate(parts) if parts else None

    @cached_property
    def audio(self) -> Waveform | None:
        """Mono samples float32 (n,); None without audio."""
        parts = [chunk.audio for chunk in self.chunks if chunk.audio is not None]
        return np.concatenate(parts) if parts else None

    @property
    def fps(self) -> float | None:
        """Frames per second; None without video."""
        return None if self.format.fps is None else float(self.format.fps)

    @property
    def sample_rate(self) -> int | None:
        """Sample rate in Hz; None without audio."""
        return self.format.sample_rate

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the clip to an mp4 file and return its path, the same file as of ``mfctl generate``.

        Raises UserInputError if the file exists and ``overwrite`` is False, or cannot be written.
        """
        target = Path(path)
        check_output_file(target, suffix=".mp4", overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in write_chunks(self.chunks, target, self.format):
            pass
        return target


def stream_clip(
    pipeline: LatentPipeline, transcript: TranscriptSource | None, options: ClipOptions
) -> Iterator[DecodedChunk]:
    """Check the input, then return an iterator over the chunks of a clip. Raises UserInputError for wrong input."""
    return _start(pipeline, transcript, options)[1]


def make_clip(pipeline: LatentPipeline, transcript: TranscriptSource | None, options: ClipOptions) -> GeneratedClip:
    """Return a whole clip. Raises UserInputError for wrong input."""
    prompt, chunks = _start(pipeline, transcript, options)
    return GeneratedClip(chunks=list(chunks), words=prompt.words, format=ClipFormat.of(pipeline))


def _start(
    pipeline: LatentPipeline, transcript: TranscriptSource | None, options: ClipOptions
) -> tuple[EncodedPrompt, Iterator[DecodedChunk]]:
    seed = options.get("seed", 0)
    params = resolve_sampling_params(
        pipeline.metadata.stage,
        mode=options.get("mode"),
        steps=options.get("steps"),
        guidance=options.get("guidance"),
        trust=options.get("trust"),
        seed=seed,
        sampler=options.get("sampler"),
    )
    prompt = encode_prompt(
        pipeline,
        transcript=transcript,
        first_frame=options.get("first_frame"),
        caption=options.get("caption", ""),
        voice=options.get("voice"),
        seconds=options.get("seconds"),
        speed=options.get("speed", 1.0),
        pauses=options.get("pauses", 1.0),
        seed=seed,
    )
    return prompt, decode_clip(pipeline, prompt.cond, prompt.chunks, params)
