import torch

from mfcore.model.ring_cache import ring_of
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import Context, schedule
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.tiny_model import BRANCHES, SHAPES, TIMELINE

PLAN = schedule(2, {VIDEO: 3.0, AUDIO: 1.0})
MOST = sum(TIMELINE.max_count(m) * b.tokens for m, b in BRANCHES.items())
CHUNKS = 9


def starts(data, first: int = 0, chunks: int = CHUNKS):
    return noise_starts(TIMELINE, SHAPES, range(first, first + chunks), 0, data.samples, data.cond.caption)


def in_ring(context: Context) -> Context:
    opened = context if context.memory is not None else context.opened()
    return opened.with_memories(lambda memory: ring_of(memory, MOST))


def streamed(context: Context, data, chunks: int = CHUNKS, **options) -> dict[str, Stream]:
    return join_chunks(c.clean for c in rollout(in_ring(context), starts(data, chunks=chunks), PLAN, **options))


def assert_same(one: dict[str, Stream], other: dict[str, Stream], tolerance: float = 1e-5) -> None:
    for m in one:
        torch.testing.assert_close(one[m].latents, other[m].latents, atol=tolerance, rtol=tolerance)
