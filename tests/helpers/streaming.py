import torch

from mfcore.model.ring_cache import to_ring_cache
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, schedule
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.tiny_model import BRANCHES, SHAPES, TIMELINE

PLAN = schedule(2, {VIDEO: 3.0, AUDIO: 1.0})
MOST = sum(TIMELINE.max_count(m) * b.tokens for m, b in BRANCHES.items())
CHUNKS = 9


def starts(data, first: int = 0, chunks: int = CHUNKS):
    return noise_starts(
        TIMELINE, SHAPES, range(first, first + chunks), seed=0, samples=data.samples, like=data.cond.caption
    )


def in_ring(context: DenoiserContext) -> DenoiserContext:
    opened = context if context.cache is not None else context.prefill()
    return opened.map_caches(lambda cache: to_ring_cache(cache, MOST))


def streamed(context: DenoiserContext, data, chunks: int = CHUNKS, **options) -> dict[str, Stream]:
    return join_chunks(c.clean for c in rollout(in_ring(context), starts(data, chunks=chunks), PLAN, **options))


def assert_same(one: dict[str, Stream], other: dict[str, Stream], tolerance: float = 1e-5) -> None:
    for m in one:
        torch.testing.assert_close(one[m].latents, other[m].latents, atol=tolerance, rtol=tolerance)
