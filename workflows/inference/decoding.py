"""Decode latents to frames and samples chunk by chunk, and write them into an mp4 file."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mfcore.types import AUDIO, VIDEO, Condition, Stream
from preprocessing.io.durable_files import atomic_path, flush_file, flush_folder
from preprocessing.media.live_muxer import LiveMuxer
from preprocessing.records import Frames, Waveform
from workflows.inference.latents import LatentPipeline
from workflows.inference.sampling import SamplingParams

CLIP_CRF = 16  # quality of H.264; lower is better


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """Signals that became final with one chunk."""

    signals: dict[str, Tensor]
    seconds: float  # time of sampling and decoding

    @property
    def video(self) -> Frames | None:
        """Frames uint8 (n, H, W, 3); None without video."""
        return self.signals[VIDEO].numpy() if VIDEO in self.signals else None

    @property
    def audio(self) -> Waveform | None:
        """Mono samples float32 (n,); None without audio."""
        return self.signals[AUDIO].numpy() if AUDIO in self.signals else None


@dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """Rates and size of the signals of a clip; None for a missing modality."""

    fps: Fraction | None
    size: tuple[int, int] | None  # height and width in pixels
    sample_rate: int | None  # Hz

    @classmethod
    def of(cls, pipeline: LatentPipeline) -> "ClipFormat":
        """Return the format of the clips of a pipeline."""
        has_video, has_audio = VIDEO in pipeline.codecs, AUDIO in pipeline.codecs
        return cls(
            fps=pipeline.fps if has_video else None,
            size=pipeline.frame_size if has_video else None,
            sample_rate=pipeline.sample_rate if has_audio else None,
        )


def decode_stream(
    pipeline: LatentPipeline, cond: Condition, chunks: int, params: SamplingParams
) -> Iterator[DecodedChunk]:
    """Yield the decoded signals of row 0 per chunk; their concatenation equals decoding all latents at once."""
    decoders = {m: codec.decoder() for m, codec in pipeline.codecs.items()}
    start = time.perf_counter()
    pending = {VIDEO: decoders[VIDEO].push(pipeline.first_frame_latent(cond, 0))} if VIDEO in decoders else {}
    for chunk in pipeline.generate_chunks(cond, chunks, params, samples=torch.zeros(1, dtype=torch.long)):
        signals = _push(pipeline, decoders, chunk, pending)
        pending = {}
        yield DecodedChunk(signals=signals, seconds=time.perf_counter() - start)
        start = time.perf_counter()
    rest = {m: d.flush() for m, d in decoders.items()}
    yield DecodedChunk(signals=rest, seconds=time.perf_counter() - start)


def _push(
    pipeline: LatentPipeline, decoders: Mapping[str, Any], chunk: Mapping[str, Stream], pending: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    new = {m: decoders[m].push(pipeline.denormalize(m, chunk[m].latents[0])) for m in chunk}
    return {m: torch.cat([pending[m], x]) if m in pending else x for m, x in new.items()}


@contextmanager
def growing_file(path: Path) -> Generator[IO[bytes]]:
    """Yield a new file that others can read while it is written; it is deleted on failure.

    An existing file of the name is replaced when the new one is complete.
    """
    if path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            yield file
        return
    try:
        with path.open("xb") as file:
            yield file
        flush_file(path)
    except FileExistsError:  # of another process
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def clip_seconds(pipeline: LatentPipeline, chunks: int) -> Fraction:
    """Return the length of a clip: its chunks, and the first frame before them."""
    return chunks * pipeline.metadata.chunk_seconds + (Fraction(1) / pipeline.fps if VIDEO in pipeline.codecs else 0)


def decode_clip(
    pipeline: LatentPipeline, cond: Condition, chunks: int, params: SamplingParams
) -> Iterator[DecodedChunk]:
    """Yield the chunks of ``decode_stream``; samples after the last frame, of the last latent, are left out."""
    left = int(clip_seconds(pipeline, chunks) * pipeline.sample_rate) if AUDIO in pipeline.codecs else 0
    for chunk in decode_stream(pipeline, cond, chunks, params):
        if AUDIO not in chunk.signals:
            yield chunk
            continue
        samples = chunk.signals[AUDIO][:left]
        left -= len(samples)
        yield replace(chunk, signals={**chunk.signals, AUDIO: samples})


def write_chunks(chunks: Iterable[DecodedChunk], target: Path, format: ClipFormat) -> Iterator[DecodedChunk]:
    """Write chunks into an mp4 file, playable while it grows, and yield each one that is written."""
    muxer = LiveMuxer(fps=format.fps, size=format.size, sample_rate=format.sample_rate, crf=CLIP_CRF)
    with growing_file(target) as file:
        for chunk in chunks:
            file.write(muxer.push(chunk.video, chunk.audio))
            file.flush()
            yield chunk
        file.write(muxer.close())
