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
_TIMED_EVALUATIONS = 24  # evaluations of a single stream, at least two chunks, from which its speed is measured
_MAX_TIMED_CHUNKS = 4  # chunks
_HISTORY_CLIPS = 16  # clips on which history use is measured
_HISTORY_CHUNKS = 8  # chunks of each


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """Generated latents of prompts of one length."""

    prompts: tuple[Prompt, ...]
    cond: Condition
    latents: tuple[dict[str, Tensor], ...]  # per row: raw, the picture's with its first frame
    length: Fraction  # seconds
    seconds: float  # that generation took


def collate_prompts(pipeline: StreamingPipeline, prompts: Sequence[Prompt]) -> Condition:
    """First frame, caption, transcript and voice of the prompts, assembled as in training."""
    shortest = min(min(p.clip.chunks for p in prompts), prompts[0].chunks)
    return _collate_real(pipeline, prompts, shortest).cond.to(pipeline.device)


def _collate_real(pipeline: StreamingPipeline, prompts: Sequence[Prompt], chunks: int) -> AVBatch:
    collator = BatchCollator(timeline=pipeline.timeline, stats=pipeline.metadata.stats)
    numbers = torch.tensor([VALIDATION_SAMPLE_OFFSET + p.number for p in prompts])
    return collator.collate([p.clip for p in prompts], chunks, numbers, 0)


def measure_history_use(
    pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams
) -> dict[str, float]:
    """``history_use_<modality>`` of the mode, on the real clips behind the prompts; nothing where they are too few."""
    usable = [p for p in prompts if p.clip.chunks > 1][:_HISTORY_CLIPS]
    if len(usable) < 2:
        return {}
    batch = _collate_real(pipeline, usable, min(_HISTORY_CHUNKS, *(p.clip.chunks for p in usable)))
    time = TimeConfig(shift=pipeline.metadata.shift)
    with pipeline.autocast():
        ratios = mode_history_use(
            pipeline.model, batch.to(pipeline.device), time, mode=params.mode, trust=params.trust_label
        )
    return {f"history_use_{m}": value for m, value in ratios.items()}


def group_prompts(prompts: Sequence[Prompt]) -> list[tuple[Prompt, ...]]:
    """Prompts of one length together, at most ``ROWS``."""
    out: list[tuple[Prompt, ...]] = []
    for _, group in groupby(sorted(prompts, key=lambda p: p.chunks), key=lambda p: p.chunks):
        group = tuple(group)
        out += [group[at : at + MAX_BATCH_SIZE] for at in range(0, len(group), MAX_BATCH_SIZE)]
    return out


def sample_all(
    pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams
) -> Iterator[SampledBatch]:
    """All prompts, those of one length together. A row's noise depends on the seed and its prompt alone."""
    return (sample_batch(pipeline, group, params) for group in group_prompts(prompts))


def sample_batch(pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams) -> SampledBatch:
    """Prompts of one length."""
    chunks = prompts[0].chunks
    cond = collate_prompts(pipeline, prompts)
    numbers = torch.tensor([VALIDATION_SAMPLE_OFFSET + p.number for p in prompts])
    start = time.perf_counter()
    streams = join_chunks(pipeline.generate_chunks(cond, chunks, params, samples=numbers))
    synchronize()
    seconds = time.perf_counter() - start
    rows: list[dict[str, Tensor]] = []
    for i in range(len(prompts)):
        row = {m: pipeline.denormalize(m, s.latents[i]) for m, s in streams.items()}
        if VIDEO in row:
            row[VIDEO] = torch.cat([pipeline.first_frame_latent(cond, i), row[VIDEO]])
        rows.append(row)
    length = chunks * pipeline.metadata.chunk_seconds
    return SampledBatch(prompts=tuple(prompts), cond=cond, latents=tuple(rows), length=length, seconds=seconds)


def decode_batch(pipeline: StreamingPipeline, batch: SampledBatch) -> list[DecodedClip]:
    """What the rows of a batch look and sound like."""
    return decode_latents(pipeline.codecs, batch.latents, [p.clip.transcript for p in batch.prompts], batch.length)


def measure_stream_speed(pipeline: StreamingPipeline, prompt: Prompt, params: SamplingParams) -> dict[str, float]:
    """One stream alone, without decoding; the pass that writes the cache is included.

    ``seconds_per_second``: of clip per second of computation; ``first_chunk_s``: from the call to the first chunk.
    """
    cond = collate_prompts(pipeline, [prompt])
    start, times = time.perf_counter(), []
    for _ in pipeline.generate_chunks(
        cond, max(2, min(_MAX_TIMED_CHUNKS, _TIMED_EVALUATIONS // params.num_function_evaluations)), params
    ):
        synchronize()
        end = time.perf_counter()
        times.append(end - start)
        start = end
    rate = float(pipeline.metadata.chunk_seconds) / median(times[1:])
    return {
        "seconds_per_second": rate,
        "real_time_factor": 1 / rate,
        "first_chunk_s": times[0],
        "peak_memory_bytes": float(_peak_memory()),
    } | ({"frames_per_second": rate * float(pipeline.fps)} if VIDEO in pipeline.codecs else {})


def _peak_memory() -> int:
    """Of the device where there is one, else of this process so far, bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
