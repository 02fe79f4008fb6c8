"""``mfctl generate``: stream chunks from a checkpoint into an mp4 with picture and sound."""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfcore.solver import Mode
from mfcore.types import AUDIO, VIDEO, Condition, Stream
from preprocessing.media.mp4_writer import Mp4Writer
from workflows.checkpoints.load import WeightKind
from workflows.inference.inputs import read_first_frame, read_transcript, read_voice
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.precision import Precision
from workflows.inference.sampling import SamplingParams, resolve_sampling_params


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """What a chunk adds to the file: signals that have become final."""

    signals: dict[str, Tensor]
    seconds: float  # time that sampling and decoding took


def generate_clip(
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
    weights: WeightKind = "ema",
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
    streamer = StreamingPipeline.from_checkpoint(checkpoint, weights, precision)
    streamer.enable_optimizations(compile=compile, graphs=graphs)
    how = resolve_sampling_params(
        streamer.card.stage, mode=mode, steps=steps, guidance=guidance, trust=trust, seed=seed
    )
    words, allotted = read_transcript(transcript)
    cond = streamer.encode_conditions(
        caption=caption,
        transcript=words,
        first_frame=read_first_frame(first_frame, streamer) if VIDEO in streamer.codecs else None,
        voice=read_voice(voice, streamer) if voice is not None and AUDIO in streamer.codecs else None,
    )
    if late := [word.word for word in words if word.start >= seconds]:
        said = f"{len(late)} of {len(words)} words begin after the end of the clip, at {seconds:g} s: {' '.join(late)}"
        print(f"warning: {said:.300}; give more --seconds", file=sys.stderr, flush=True)
    if doubt := streamer.card.step_count_warning(how.mode, how.steps):
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = stream_to_mp4(streamer, cond, ceil(seconds / float(streamer.card.chunk_seconds)), how, target)
    made = {"mode": how.mode, "steps": how.steps, "nfe": how.num_function_evaluations, "precision": streamer.precision}
    return {"path": str(target), **facts, **made} | (
        {"word_times": "allotted from the speaking rate", "transcript": [vars(w) for w in words]} if allotted else {}
    )


def decode_stream(
    streamer: StreamingPipeline, cond: Condition, chunks: int, how: SamplingParams
) -> Iterator[DecodedChunk]:
    """Signals of one row, chunk by chunk; together they equal decoding the whole."""
    decoders = {m: codec.decoder() for m, codec in streamer.codecs.items()}
    began = time.perf_counter()
    pending = {VIDEO: decoders[VIDEO].push(streamer.first_frame_latent(cond, 0))} if VIDEO in decoders else {}
    for chunk in streamer.generate_chunks(cond, chunks, how, samples=torch.zeros(1, dtype=torch.long)):
        signals = _push(streamer, decoders, chunk, pending)
        pending = {}
        yield DecodedChunk(signals=signals, seconds=time.perf_counter() - began)
        began = time.perf_counter()
    rest = {m: d.flush() for m, d in decoders.items()}
    yield DecodedChunk(signals=rest, seconds=time.perf_counter() - began)


def _push(
    streamer: StreamingPipeline, decoders: Mapping[str, Any], chunk: Mapping[str, Stream], pending: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    new = {m: decoders[m].push(streamer.denormalize(m, chunk[m].latents[0])) for m in chunk}
    return {m: torch.cat([pending[m], x]) if m in pending else x for m, x in new.items()}


def stream_to_mp4(
    streamer: StreamingPipeline, cond: Condition, chunks: int, how: SamplingParams, target: Path
) -> dict[str, Any]:
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
        for portion in decode_stream(streamer, cond, chunks, how):
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
