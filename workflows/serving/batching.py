"""Several clips in one forward pass: rows of different age, with equal numbers of cached chunks.

A row is one clip. Rows run together if their caches hold equally many chunks: a clip that is younger than the window
runs with others of its age, and older clips run together. Before they are stacked, caches move to a common chunk number
(``mfcore.model.rebase``). Results equal those of the clip alone within float tolerance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor
from torch.nn import functional as F

from mfcore.model.config import ModelConfig
from mfcore.model.kv_cache import LayeredKVCache
from mfcore.model.rebase import rebase_cache
from mfcore.model.ring_cache import to_ring_cache
from mfcore.rollout import GeneratedChunk, noise_starts, step_noise
from mfcore.solver import DenoiserContext, Schedule, StepNoise, denoise
from mfcore.timeline import Timeline
from mfcore.types import Condition, Stream, Streams, VelocityModel
from workflows.inference.sampling import SamplingParams


@dataclass(kw_only=True)
class ClipRow:
    """One clip between two chunks. Mutable: ``advance_rows`` moves it by a chunk."""

    cond: Condition  # of one row; word times in seconds since the start of the clip
    cache: LayeredKVCache  # at the chunk number `chunk`
    chunk: int  # next chunk of the clip
    seed: int


@dataclass(frozen=True, kw_only=True)
class ChunkSampler:
    """Network and sampling parameters shared by all rows. Few-step or unguided multi-step sampling."""

    model: VelocityModel
    config: ModelConfig
    timeline: Timeline
    shapes: Mapping[str, tuple[int, ...]]
    levels: Schedule
    params: SamplingParams

    def __post_init__(self) -> None:
        assert self.params.guidance == 1.0, "rows with guidance do not share a pass"

    @property
    def period(self) -> int:
        """Return the number of chunks after which the latents per chunk repeat."""
        rates = [clock.rate * self.timeline.chunk_seconds for clock in self.timeline.clocks.values()]
        return lcm(*(rate.denominator for rate in rates))

    @torch.no_grad()
    def start_row(self, cond: Condition, *, seed: int) -> ClipRow:
        """Return the row of a new clip."""
        cache = DenoiserContext(model=self.model, cond=cond).prefill().cache
        assert isinstance(cache, LayeredKVCache)
        return ClipRow(cond=cond, cache=cache, chunk=0, seed=seed)

    def batch_key(self, row: ClipRow) -> tuple[int, int]:
        """Return what rows of one forward pass have in common: cached chunks, and phase of the latents per chunk."""
        return min(row.chunk, self.config.window_chunks), row.chunk % self.period

    @torch.no_grad()
    def advance_rows(self, rows: Sequence[ClipRow]) -> list[dict[str, Stream]]:
        """Generate the next chunk of rows of one ``batch_key`` and return their clean latents."""
        clock = min(row.chunk for row in rows)  # common chunk number
        starts = [self._start(row, clock) for row in rows]
        start = {m: s.with_latents(torch.cat([own[m].latents for own in starts])) for m, s in starts[0].items()}
        cond = stack_conditions([self._moved_condition(row, clock) for row in rows])
        caches = [rebase_cache(row.cache, clock - row.chunk, self.config) for row in rows]
        cache = LayeredKVCache.stack(caches) if len(caches) > 1 else caches[0]
        tokens = sum(self.timeline.max_count(m) * b.tokens for m, b in self.config.branches.items())
        context = DenoiserContext(model=self.model, cond=cond, cache=to_ring_cache(cache, tokens))
        renoising = self.params.renoising(_noise_of(rows))
        clean, _ = denoise(context, start, self.levels, mode=self.params.mode, renoising=renoising)
        label = self.params.trust_label
        trust = None if label is None else torch.full((len(rows),), label, device=cond.caption.device)
        made = GeneratedChunk(clean=clean, exit_state=None, before=context, trust=trust, evict=True)
        after = made.context.cache
        assert after is not None
        value = after.snapshot()
        assert isinstance(value, LayeredKVCache)
        for i, row in enumerate(rows):
            row.cache = rebase_cache(value.rows(torch.tensor([i])), row.chunk - clock, self.config)
            row.chunk += 1
        return [{m: s.rows(slice(i, i + 1)) for m, s in clean.items()} for i in range(len(rows))]

    def _start(self, row: ClipRow, clock: int) -> dict[str, Stream]:
        """Return the noise of the next chunk of a row, at the positions of chunk `clock`."""
        numbers = torch.zeros(1, dtype=torch.long)
        like = row.cond.caption.float()
        chunks = range(row.chunk, row.chunk + 1)
        noise = next(noise_starts(self.timeline, self.shapes, chunks, seed=row.seed, samples=numbers, like=like))
        return {
            m: Stream(
                latents=s.latents,
                times=self.timeline.times(m, 1, clock),
                chunk=self.timeline.chunk_index(m, 1, clock),
            )
            for m, s in noise.items()
        }

    def _moved_condition(self, row: ClipRow, clock: int) -> Condition:
        seconds = (clock - row.chunk) * float(self.timeline.chunk_seconds)
        return replace(row.cond, word_times=row.cond.word_times + seconds)


def _noise_of(rows: Sequence[ClipRow]) -> StepNoise:
    """Return the noise of the renoise sampler, equal to that of each clip alone."""
    sources = [(step_noise(row.seed, torch.zeros(1, dtype=torch.long)), row.chunk) for row in rows]

    def noise(state: Streams, step: int) -> dict[str, Tensor]:
        parts: list[Mapping[str, Tensor]] = []
        for i, (source, chunk) in enumerate(sources):
            own = {m: s.rows(slice(i, i + 1)) for m, s in state.items()}
            parts.append(source({m: replace(s, chunk=torch.full_like(s.chunk, chunk)) for m, s in own.items()}, step))
        return {m: torch.cat([part[m] for part in parts]) for m in state}

    return noise


def stack_conditions(conditions: Sequence[Condition]) -> Condition:
    """Concatenate the rows of conditions of different length; missing tokens are masked."""
    captions = max(c.caption.shape[1] for c in conditions)
    words = max(c.words.shape[1] for c in conditions)
    padded = [
        replace(
            c,
            caption=_padded(c.caption, captions),
            caption_mask=_padded(c.caption_mask, captions),
            words=_padded(c.words, words),
            words_mask=_padded(c.words_mask, words),
            word_times=_padded(c.word_times, words),
        )
        for c in conditions
    ]
    return Condition.stack(padded)


def _padded(x: Tensor, length: int) -> Tensor:
    """Append zeros, or False, along the second dimension."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))
