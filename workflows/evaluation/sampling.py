"""Generate the samples of one setting in batches; measure the speed of a single stream and the history use."""

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
_TIMED_EVALUATIONS = 24  # evaluations of the speed measurement, at least two chunks
_MAX_TIMED_CHUNKS = 4
_HISTORY_CLIPS = 16  # clips for the measurement of history use
_HISTORY_CHUNKS = 8  # chunks per clip


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """Generated latents of prompts of one length."""

    prompts: tuple[Prompt, ...]
    cond: Condition
    latents: tuple[dict[str, Tensor], ...]  # raw, per row; video includes the first frame
    length: Fraction  # seconds
    seconds: float  # sampling time


def collate_prompts(pipeline: StreamingPipeline, prompts: Sequence[Prompt]) -> Condition:
    """Return the conditions of prompts of equal length. Clips no longer than their sample give no reference voice."""
    return _collate_real(pipeline, prompts, 1, target_chunks=prompts[0].chunks).cond.to(pipeline.device)


def _collate_real(
    pipeline: StreamingPipeline, prompts: Sequence[Prompt], chunks: int, *, target_chunks: int | None = None
) -> AVBatch:
    collator = BatchCollator(timeline=pipeline.timeline, stats=pipeline.metadata.stats)
    numbers = torch.tensor([VALIDATION_SAMPLE_OFFSET + p.number for p in prompts])
    return collator.collate([p.clip for p in prompts], chunks, numbers, 0, target_chunks=target_chunks)


def measure_history_use(
    pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams
) -> dict[str, float]:
    """Return ``history_use_<modality>`` of the mode on the clips of the prompts; empty with fewer than two clips."""
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
    """Group prompts of equal length into batches of at most ``MAX_BATCH_SIZE``."""
    out: list[tuple[Prompt, ...]] = []
    for _, group in groupby(sorted(prompts, key=lambda p: p.chunks), key=lambda p: p.chunks):
        group = tuple(group)
        out += [group[at : at + MAX_BATCH_SIZE] for at in range(0, len(group), MAX_BATCH_SIZE)]
    return out


def sample_all(
    pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams
) -> Iterator[SampledBatch]:
    """Sample all prompts in batches. The noise of a row depends only on the seed and its prompt."""
    return (sample_batch(pipeline, group, params) for group in group_prompts(prompts))


def sample_batch(pipeline: StreamingPipeline, prompts: Sequence[Prompt], params: SamplingParams) -> SampledBatch:
    """Sample prompts of equal length in one batch."""
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
    """Decode the rows of a batch."""
    return decode_latents(pipeline.codecs, batch.latents, [p.clip.transcript for p in batch.prompts], batch.length)


def measure_stream_speed(pipeline: StreamingPipeline, prompt: Prompt, params: SamplingParams) -> dict[str, float]:
    """Measure a single stream without decoding; the pass that writes the KV cache is included.

    ``seconds_per_second``: clip seconds per second of computation. ``first_chunk_s``: latency of the first chunk.
    """
    cond = collate_prompts(pipeline, [prompt])
    times: list[float] = []
    max_chunks = max(2, min(_MAX_TIMED_CHUNKS, _TIMED_EVALUATIONS // params.num_function_evaluations))
    start = time.perf_counter()
    for _ in pipeline.generate_chunks(cond, max_chunks, params):
        synchronize()
        end = time.perf_counter()
        times.append(end - start)
        start = end
    rate = float(pipeline.metadata.chunk_seconds) / median(times[1:])
    speed = {
        "seconds_per_second": rate,
        "real_time_factor": 1 / rate,
        "first_chunk_s": times[0],
        "peak_memory_bytes": float(_peak_memory()),
    }
    if VIDEO in pipeline.codecs:
        speed["frames_per_second"] = rate * float(pipeline.fps)
    return speed


def _peak_memory() -> int:
    """Return the peak memory of the GPU, else of this process, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
