"""The only chunk-by-chunk loop: training makes its histories with it, generation streams with it (METHOD 6, 8)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.flow import add_noise
from mfcore.rng import normal_rows
from mfcore.solver import DenoiserContext, Mode, Schedule, constant_levels, denoise
from mfcore.timeline import Timeline
from mfcore.types import Condition, Stream, Streams


@dataclass(frozen=True, kw_only=True)
class GeneratedChunk:
    """One finished chunk."""

    clean: dict[str, Stream]
    exit_state: dict[str, Stream] | None  # the state at the exit step, before it was taken
    before: DenoiserContext  # what it was made from
    trust: Float[Tensor, " B"] | None
    forget: bool

    @cached_property
    def context(self) -> DenoiserContext:
        """Remembers this chunk: continue, or snapshot, from here. Written when first asked for: nobody reads the
        keys and values of the last chunk of a clip."""
        data = {m: s.with_latents(s.latents.detach()) for m, s in self.clean.items()}
        after = self.before.append_history(data, self.trust)
        return after.evict_before(int(next(iter(data.values())).chunk[-1]) + 1) if self.forget else after


def rollout(
    context: DenoiserContext,
    starts: Iterable[Streams],
    plan: Schedule,
    *,
    mode: Mode = "few",
    trust: Float[Tensor, " B"] | None = None,
    exit_step: int | None = None,
    forget: bool = True,
    conds: Iterable[Condition] | None = None,
) -> Iterator[GeneratedChunk]:
    """Generate one chunk per item of ``starts`` (its state at ``plan``'s first level), each seeing those before it.

    ``exit_step`` j keeps the state at level t_j. ``trust`` labels the history that is written, ``forget`` lets go of
    what later chunks cannot see. ``conds``: the condition of each chunk, where it changes on the way; the sink stays
    that of the first one, and what was said before stays in memory as it was said.

    Streams for ever at constant cost where ``context`` remembers in a ring (``mfcore.model.ring``); then a chunk's
    ``context`` is good until the next chunk, and what is to last longer is its ``snapshot()``.

    Gradient, where it is enabled: a chunk's runs through its own steps from ``exit_step`` on (without one: none),
    which read memory as data; the memory's runs through the passes that write it, which read chunks as data.
    """
    context = context if context.memory is not None else context.prefill()
    chunk = None
    for start, cond in zip(starts, repeat(context.cond) if conds is None else conds, strict=False):
        context = replace(chunk.context if chunk else context, cond=cond)
        clean, stash = denoise(context, start, plan, mode=mode, exit_step=exit_step)
        chunk = GeneratedChunk(clean=clean, exit_state=stash, before=context, trust=trust, forget=forget)
        yield chunk


def noise_starts(
    timeline: Timeline,
    shapes: Mapping[str, tuple[int, ...]],
    chunks: range,
    seed: int,
    samples: Tensor,
    like: Tensor,
) -> Iterator[dict[str, Stream]]:
    """Pure noise for each chunk; row i depends on (seed, chunk, samples[i]) alone.

    ``shapes``: latent shape (C, ...) per modality; ``like`` gives device and type.
    """
    for k in chunks:
        yield {m: _noise_chunk(timeline, m, shape, k, seed, samples, like) for m, shape in shapes.items()}


def _noise_chunk(
    timeline: Timeline, modality: str, shape: tuple[int, ...], k: int, seed: int, samples: Tensor, like: Tensor
) -> Stream:
    empty = like.new_empty((len(samples), timeline.count(modality, 1, k), *shape))
    return Stream(
        latents=normal_rows(seed, f"start/{modality}/{k}", samples, empty),
        times=timeline.times(modality, 1, k),
        chunk=timeline.chunk_index(modality, 1, k),
    )


def coupled_starts(
    real: Streams, eps: dict[str, Tensor], strength: Mapping[str, Tensor], chunks: int
) -> Iterator[dict[str, Stream]]:
    """Each real chunk noised to t = s, so that finishing it stays with the clip (METHOD 6, coupled history)."""
    starts = add_noise(real, eps, constant_levels(real, strength))
    for k in range(chunks):
        yield {m: s.chunks(k, k + 1) for m, s in starts.items()}


def join_chunks(chunks: Iterable[Mapping[str, Stream]]) -> dict[str, Stream]:
    """One stream per modality from consecutive chunks."""
    parts = list(chunks)
    return {
        m: Stream(
            latents=torch.cat([p[m].latents for p in parts], dim=1),
            times=torch.cat([p[m].times for p in parts]),
            chunk=torch.cat([p[m].chunk for p in parts]),
        )
        for m in parts[0]
    }
