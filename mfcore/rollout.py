"""Rollout: the chunk-by-chunk loop of training histories and of streaming generation (METHOD 6, 8)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.flow import add_noise
from mfcore.rng import normal_rows
from mfcore.solver import DenoiserContext, Mode, Renoising, Schedule, StepNoise, constant_levels, denoise
from mfcore.timeline import Timeline
from mfcore.types import Condition, Stream, Streams


@dataclass(kw_only=True)
class GeneratedChunk:
    """Finished chunk of a rollout. Mutable: the first read of ``context`` writes the chunk to the cache."""

    clean: dict[str, Stream]
    exit_state: dict[str, Stream] | None  # state before the exit step
    before: DenoiserContext  # context that the chunk was generated from
    trust: Float[Tensor, " B"] | None
    evict: bool

    @cached_property
    def context(self) -> DenoiserContext:
        """Context with this chunk in the cache, to continue from.

        Computed on the first read, because the last chunk of a clip is never attended to.
        """
        data = {m: s.with_latents(s.latents.detach()) for m, s in self.clean.items()}
        after = self.before.append_history(data, self.trust)
        return after.evict_before(int(next(iter(data.values())).chunk[-1]) + 1) if self.evict else after


def rollout(
    context: DenoiserContext,
    starts: Iterable[Streams],
    schedule: Schedule,
    *,
    mode: Mode = "few",
    trust: Float[Tensor, " B"] | None = None,
    exit_step: int | None = None,
    evict: bool = True,
    conds: Iterable[Condition] | None = None,
    renoising: Renoising | None = None,
) -> Iterator[GeneratedChunk]:
    """Generate one chunk per item of ``starts``, each conditioned on the chunks before it.

    Each start is the state of a chunk at the first level of ``schedule``. Streams without end at constant cost if
    ``context`` has a ring cache (``mfcore.model.ring_cache``). The context of a chunk is then valid until the next
    chunk; its ``snapshot()`` stays valid.

    If gradients are enabled, a chunk has one through its own steps from ``exit_step`` on; these read the cache without
    gradient. The cache has one through the passes that write it; these read the chunks without gradient.

    ``trust`` labels the history that is written. The state before ``exit_step`` j is returned with the chunk. ``evict``
    drops chunks that later ones cannot see. ``conds`` gives the condition of each chunk, if it changes. Sink and
    history keep the condition that they were written with. ``renoising`` selects the renoise sampler.
    """
    context = context if context.cache is not None else context.prefill()
    chunk = None
    for start, cond in zip(starts, repeat(context.cond) if conds is None else conds, strict=False):
        context = replace(chunk.context if chunk else context, cond=cond)
        clean, exit_state = denoise(context, start, schedule, mode=mode, exit_step=exit_step, renoising=renoising)
        chunk = GeneratedChunk(clean=clean, exit_state=exit_state, before=context, trust=trust, evict=evict)
        yield chunk


def noise_starts(
    timeline: Timeline,
    shapes: Mapping[str, tuple[int, ...]],
    chunks: range,
    *,
    seed: int,
    samples: Tensor,
    like: Tensor,
) -> Iterator[dict[str, Stream]]:
    """Yield pure noise for each chunk. Row i depends on (seed, chunk, samples[i]) only.

    ``shapes``: latent shape (C, ...) per modality. ``like`` gives device and dtype.
    """
    for k in chunks:
        streams: dict[str, Stream] = {}
        for m, shape in shapes.items():
            empty = like.new_empty((len(samples), timeline.count(m, 1, k), *shape))
            streams[m] = Stream(
                latents=normal_rows(seed, f"start/{m}/{k}", samples, empty),
                times=timeline.times(m, 1, k),
                chunk=timeline.chunk_index(m, 1, k),
            )
        yield streams


def step_noise(seed: int, samples: Tensor) -> StepNoise:
    """Return the noise of the renoise sampler. That of row i depends on (seed, chunk, step, samples[i]) only."""

    def noise(state: Streams, step: int) -> dict[str, Tensor]:
        drawn: dict[str, Tensor] = {}
        for m, stream in state.items():
            parts: list[Tensor] = []
            for k in range(int(stream.chunk[0]), int(stream.chunk[-1]) + 1):
                like = stream.chunks(k, k + 1).latents
                parts.append(normal_rows(seed, f"renoise/{m}/{k}/{step}", samples, like))
            drawn[m] = torch.cat(parts, dim=1)
        return drawn

    return noise


def coupled_starts(
    real: Streams, eps: dict[str, Tensor], strength: Mapping[str, Tensor], chunks: int
) -> Iterator[dict[str, Stream]]:
    """Yield each real chunk noised to t = ``strength``: the starts of coupled history (METHOD 6)."""
    starts = add_noise(real, eps, constant_levels(real, strength))
    for k in range(chunks):
        yield {m: s.chunks(k, k + 1) for m, s in starts.items()}


def join_chunks(chunks: Iterable[Mapping[str, Stream]]) -> dict[str, Stream]:
    """Concatenate consecutive chunks to one stream per modality."""
    parts = list(chunks)
    return {
        m: Stream(
            latents=torch.cat([p[m].latents for p in parts], dim=1),
            times=torch.cat([p[m].times for p in parts]),
            chunk=torch.cat([p[m].chunk for p in parts]),
        )
        for m in parts[0]
    }
