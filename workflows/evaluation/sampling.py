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
from mfcore.rollout import join_chunks
from mfcore.types import VIDEO, AVBatch, Condition
from workflows.data.collate import HELD_OUT_FIRST, Assembly
from workflows.evaluation.held_out import Prompt
from workflows.evaluation.signals import Signals, decode_rows
from workflows.inference.pipeline import Streamer
from workflows.inference.sampling import Sampling
from workflows.utils.timing import synchronize

ROWS = 16  # clips generated at once
_TIMED = 24  # evaluations of a single stream, at least two chunks, from which its speed is measured
_MOST_TIMED = 4  # chunks
_HISTORIES = 16  # clips on which history use is measured
_HISTORY = 8  # chunks of each


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Generated latents of prompts of one length."""

    prompts: tuple[Prompt, ...]
    cond: Condition
    latents: tuple[dict[str, Tensor], ...]  # per row: raw, the picture's with its first frame
    length: Fraction  # seconds
    seconds: float  # that generation took


def condition(streamer: Streamer, prompts: Sequence[Prompt]) -> Condition:
    """First frame, caption, transcript and voice of the prompts, assembled as in training."""
    shortest = min(min(p.clip.chunks for p in prompts), prompts[0].chunks)
    return _real(streamer, prompts, shortest).cond.to(streamer.device)


def _real(streamer: Streamer, prompts: Sequence[Prompt], chunks: int) -> AVBatch:
    assembly = Assembly(timeline=streamer.timeline, stats=streamer.card.stats)
    numbers = torch.tensor([HELD_OUT_FIRST + p.number for p in prompts])
    return assembly.batch([p.clip for p in prompts], chunks, numbers, 0)


def history_use(streamer: Streamer, prompts: Sequence[Prompt], how: Sampling) -> dict[str, float]:
    """``history_use_<modality>`` of the mode, on the real clips behind the prompts; nothing where they are too few."""
    usable = [p for p in prompts if p.clip.chunks > 1][:_HISTORIES]
    if len(usable) < 2:
        return {}
    batch = _real(streamer, usable, min(_HISTORY, *(p.clip.chunks for p in usable)))
    time = TimeConfig(shift=streamer.card.shift)
    with streamer.computing():
        found = mode_history_use(streamer.model, batch.to(streamer.device), time, mode=how.mode, trust=how.label)
    return {f"history_use_{m}": value for m, value in found.items()}


def batches(prompts: Sequence[Prompt]) -> list[tuple[Prompt, ...]]:
    """Prompts of one length together, at most ``ROWS``."""
    out: list[tuple[Prompt, ...]] = []
    for _, group in groupby(sorted(prompts, key=lambda p: p.chunks), key=lambda p: p.chunks):
        same = tuple(group)
        out += [same[at : at + ROWS] for at in range(0, len(same), ROWS)]
    return out


def generate(streamer: Streamer, prompts: Sequence[Prompt], how: Sampling) -> Iterator[Batch]:
    """All prompts, those of one length together. A row's noise depends on the seed and its prompt alone."""
    return (sample(streamer, same, how) for same in batches(prompts))


def sample(streamer: Streamer, prompts: Sequence[Prompt], how: Sampling) -> Batch:
    """Prompts of one length."""
    chunks = prompts[0].chunks
    cond = condition(streamer, prompts)
    numbers = torch.tensor([HELD_OUT_FIRST + p.number for p in prompts])
    began = time.perf_counter()
    streams = join_chunks(streamer.stream(cond, chunks, how, samples=numbers))
    synchronize()
    seconds = time.perf_counter() - began
    rows: list[dict[str, Tensor]] = []
    for i in range(len(prompts)):
        row = {m: streamer.raw(m, s.latents[i]) for m, s in streams.items()}
        if VIDEO in row:
            row[VIDEO] = torch.cat([streamer.first_latents(cond, i), row[VIDEO]])
        rows.append(row)
    length = chunks * streamer.card.chunk_seconds
    return Batch(prompts=tuple(prompts), cond=cond, latents=tuple(rows), length=length, seconds=seconds)


def decode(streamer: Streamer, batch: Batch) -> list[Signals]:
    """What the rows of a batch look and sound like."""
    return decode_rows(streamer.codecs, batch.latents, [p.clip.transcript for p in batch.prompts], batch.length)


def stream_speed(streamer: Streamer, prompt: Prompt, how: Sampling) -> dict[str, float]:
    """One stream alone, without decoding; the pass that writes the cache is included.

    ``seconds_per_second``: of clip per second of computation; ``first_chunk_s``: from the call to the first chunk.
    """
    cond = condition(streamer, [prompt])
    began, times = time.perf_counter(), []
    for _ in streamer.stream(cond, max(2, min(_MOST_TIMED, _TIMED // how.nfe)), how):
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
