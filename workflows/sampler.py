"""Samples of one setting of a sweep, many rows at once, and how fast one row alone would stream."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from statistics import median

import torch
from torch import Tensor

from mfcore.rollout import join_chunks
from mfcore.types import VIDEO, Condition
from workflows.data import HELD_OUT_FIRST, Assembly
from workflows.heldout import Prompt, Signals, decode_rows
from workflows.streamer import Sampling, Streamer

ROWS = 16  # clips generated at once
_TIMED = 24  # evaluations of a single stream, at least two chunks, from which its speed is measured
_MOST_TIMED = 4  # chunks


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
    assembly = Assembly(timeline=streamer.timeline, stats=streamer.card.stats)
    shortest = min(min(p.clip.chunks for p in prompts), prompts[0].chunks)
    numbers = torch.tensor([HELD_OUT_FIRST + p.number for p in prompts])
    return assembly.batch([p.clip for p in prompts], shortest, numbers, 0).cond


def generate(streamer: Streamer, prompts: Sequence[Prompt], how: Sampling) -> Iterator[Batch]:
    """All prompts, those of one length together. A row's noise depends on the seed and its prompt alone."""
    for chunks, group in groupby(sorted(prompts, key=lambda p: p.chunks), key=lambda p: p.chunks):
        same = list(group)
        for at in range(0, len(same), ROWS):
            yield _batch(streamer, same[at : at + ROWS], chunks, how)


def _batch(streamer: Streamer, prompts: Sequence[Prompt], chunks: int, how: Sampling) -> Batch:
    cond = condition(streamer, prompts)
    numbers = torch.tensor([HELD_OUT_FIRST + p.number for p in prompts])
    began = time.perf_counter()
    streams = join_chunks(streamer.stream(cond, chunks, how, samples=numbers))
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
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return {
        "seconds_per_second": float(streamer.card.chunk_seconds) / median(times[1:]),
        "first_chunk_s": times[0],
    }


def batch_speed(batches: Sequence[Batch]) -> dict[str, float]:
    """The same of many streams at once, added up."""
    made = sum(float(b.length) * len(b.prompts) for b in batches)
    return {
        "batch_seconds_per_second": made / sum(b.seconds for b in batches),
        "batch_rows": float(max(len(b.prompts) for b in batches)),
    }
