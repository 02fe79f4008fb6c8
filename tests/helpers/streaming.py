"""Streams of the small network on a ring cache."""

import torch

from mfcore.model.ring_cache import to_ring_cache
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, schedule
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.tiny_model import BRANCHES, SHAPES, TIMELINE

SCHEDULE = schedule(2, {VIDEO: 3.0, AUDIO: 1.0})
MAX_TOKENS = sum(TIMELINE.max_count(m) * b.tokens for m, b in BRANCHES.items())
CHUNKS = 9


def starts(data, first: int = 0, chunks: int = CHUNKS):
    """Yield the noise of ``chunks`` chunks from ``first`` on."""
    return noise_starts(
        TIMELINE, SHAPES, range(first, first + chunks), seed=0, samples=data.samples, like=data.cond.caption
    )


def with_ring_cache(context: DenoiserContext) -> DenoiserContext:
    """Return ``context`` with its caches converted to rings."""
    prefilled = context if context.cache is not None else context.prefill()
    return prefilled.map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))


def streamed(context: DenoiserContext, data, chunks: int = CHUNKS, **options) -> dict[str, Stream]:
    """Return a clip that is streamed on a ring cache."""
    return join_chunks(
        c.clean for c in rollout(with_ring_cache(context), starts(data, chunks=chunks), SCHEDULE, **options)
    )


def assert_same(one: dict[str, Stream], other: dict[str, Stream], tolerance: float = 1e-5) -> None:
    """Assert that two clips are equal within ``tolerance``."""
    for m in one:
        torch.testing.assert_close(one[m].latents, other[m].latents, atol=tolerance, rtol=tolerance)
