"""Samples of one setting of a sweep, many rows at once, and how fast one row alone would stream."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from statistics import median

import torch
from torch import Tensor

from mfcore.flow import TimeConfig
from mfcore.metrics.history_use import mode_history_use
from mfcore.rng import VALIDATION_SAMPLE_OFFSET
from mfcore.rollout import join_chunks
from mfcore.types import VIDEO, AVBatch, Condition
from workflows.data.collate import BatchCollator
from workflows.evaluation.held_out import Prompt
from workflows.evaluation.signals import DecodedClip, decode_latents
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.sampling import SamplingParams
from workflows.utils.timing import synchronize

MAX_BATCH_SIZE = 16  # clips generated at once
_TIMED = 24  # evaluations of a single stream, at least two chunks, from which its speed is measured
_MOST_TIMED = 4  # chunks
_HISTORIES = 16  # clips on which history use is measured
_HISTORY = 8  # chunks of each


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """Generated latents of prompts of one length."""

    prompts: tuple[Prompt, ...]
    cond: Condition
    latents: tuple[dict[str, Tensor], ...]  # per row: raw, the picture's with its first frame
    length: Fraction  # seconds
    seconds: float  # that generation took


def collate_prompts(streamer: StreamingPipeline, prompts: Sequence[Prompt]) -> Condition:
    """First frame, caption, transcript and voice of the prompts, assembled as in training."""
    shortest = min(min(p.clip.chunks for p in prompts), prompts[0].chunks)
    return _real(streamer, prompts, shortest).cond.to(streamer.device)


def _real(streamer: StreamingPipeline, prompts: Sequence[Prompt], chunks: int) -> AVBatch:
    assembly = BatchCollator(timeline=streamer.timeline, stats=streamer.card.stats)
    numbers = torch.tensor([VALIDATION_SAMPLE_OFFSET + p.number for p in prompts])
    return assembly.collate([p.clip for p in prompts], chunks, numbers, 0)


def measure_history_use(
    streamer: StreamingPipeline, prompts: Sequence[Prompt], how: SamplingParams
) -> dict[str, float]:
    """``history_use_<modality>`` of the mode, on the real clips behind the prompts; nothing where they are too few."""
    usable = [p for p in prompts if p.clip.chunks > 1][:_HISTORIES]
    if len(usable) < 2:
        return {}
    batch = _real(streamer, usable, min(_HISTORY, *(p.clip.chunks for p in usable)))
    time = TimeConfig(shift=streamer.card.shift)
    with streamer.autocast():
        found = mode_history_use(streamer.model, batch.to(streamer.device), time, mode=how.mode, trust=how.trust_label)
    return {f"history_use_{m}": value for m, value in found.items()}


def group_prompts(prompts: Sequence[Prompt]) -> list[tuple[Prompt, ...]]:
    """Prompts of one length together, at most ``ROWS``."""
    out: list[tuple[Prompt, ...]] = []
    for _, group in groupby(sorted(prompts, key=lambda p: p.chunks), key=lambda p: p.chunks):
        same = tuple(group)
        out += [same[at : at + MAX_BATCH_SIZE] for at in range(0, len(same), MAX_BATCH_SIZE)]
    return out


def sample_all(streamer: StreamingPipeline, prompts: Sequence[Prompt], how: SamplingParams) -> Iterator[SampledBatch]:
    """All prompts, those of one length together. A row's noise depends on the seed and its prompt alone."""
    return (sample_batch(streamer, same, how) for same in group_prompts(prompts))


def sample_batch(streamer: StreamingPipeline, prompts: Sequence[Prompt], how: SamplingParams) -> SampledBatch:
    """Prompts of one length."""
    chunks = prompts[0].chunks
    cond = collate_prompts(streamer, prompts)
    numbers = torch.tensor([VALIDATION_SAMPLE_OFFSET + p.number for p in prompts])
    began = time.perf_counter()
    streams = join_chunks(streamer.generate_chunks(cond, chunks, how, samples=numbers))
    synchronize()
    seconds = time.perf_counter() - began
    rows: list[dict[str, Tensor]] = []
    for i in range(len(prompts)):
        row = {m: streamer.denormalize(m, s.latents[i]) for m, s in streams.items()}
        if VIDEO in row:
            row[VIDEO] = torch.cat([streamer.first_frame_latent(cond, i), row[VIDEO]])
        rows.append(row)
    length = chunks * streamer.card.chunk_seconds
    return SampledBatch(prompts=tuple(prompts), cond=cond, latents=tuple(rows), length=length, seconds=seconds)


def decode_batch(streamer: StreamingPipeline, batch: SampledBatch) -> list[DecodedClip]:
    """What the rows of a batch look and sound like."""
    return decode_latents(streamer.codecs, batch.latents, [p.clip.transcript for p in batch.prompts], batch.length)


def measure_stream_speed(streamer: StreamingPipeline, prompt: Prompt, how: SamplingParams) -> dict[str, float]:
    """One stream alone, without decoding; the pass that writes the cache is included.

    ``seconds_per_second``: of clip per second of computation; ``first_chunk_s``: from the call to the first chunk.
    """
    cond = collate_prompts(streamer, [prompt])
    began, times = time.perf_counter(), []
    for _ in streamer.generate_chunks(cond, max(2, min(_MOST_TIMED, _TIMED // how.num_function_evaluations)), how):
        synchronize()
        now = time.perf_counter()
        times.append(now - began)
        began = now
    rate = float(streamer.card.chunk_seconds) / median(times[1:])
    return {
        "seconds_per_second": rate,
        "real_time_factor": 1 / rate,
        "first_chunk_s": times[0],
        "peak_memory_bytes": float(_peak_memory()),
    } | ({"frames_per_second": rate * float(streamer.fps)} if VIDEO in streamer.codecs else {})


def _peak_memory() -> int:
    """Of the device where there is one, else of this process so far, bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
