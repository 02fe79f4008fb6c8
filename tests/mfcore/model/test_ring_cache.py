"""Streaming with a ring cache equals recomputation under the window mask, in constant memory."""

from dataclasses import replace

import pytest
import torch

from mfcore.model.ring_cache import RingKVCache, to_ring_cache
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, denoise
from mfcore.types import AUDIO, VIDEO, Stream
from tests.helpers.streaming import CHUNKS, MAX_TOKENS, SCHEDULE, assert_same, starts, streamed, with_ring_cache
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network


def recomputed(context: DenoiserContext, data) -> dict[str, Stream]:
    """Recompute the whole prefix for every chunk, in one pass under the window mask."""
    made: list[dict[str, Stream]] = []
    for start in starts(data):
        now = context if not made else context.append_history(join_chunks(made), None)
        made.append(denoise(now, start, SCHEDULE)[0])
    return join_chunks(made)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 1},
        {"window": 20},
        {"coupled": False},
        {"kv_heads": 1},
        {"word_heads": 1},
        {"layout": "wan"},
        {"cross_bias": -4.0, "heads": 4, "kv_heads": 2},
        {"local_start": False, "chunk_phase": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_ring_equals_recomputing_the_prefix_under_the_window_mask(changes):
    """Use chunks of 7 or 8 audio latents, which do not replace each other exactly."""
    model, data = network(**({"window": 3} | changes)), batch()
    context = DenoiserContext(model=model, cond=data.cond)
    assert {TIMELINE.count(AUDIO, 1, k) for k in range(CHUNKS)} == {7, 8}
    assert_same(streamed(context, data), recomputed(context, data), 3e-5)


@pytest.mark.parametrize("modality", [VIDEO, AUDIO])
@torch.no_grad()
def test_a_ring_works_for_one_modality(modality):
    model, data = network(modality), batch(2, 1, modality)
    context = DenoiserContext(model=model, cond=data.cond)
    shapes = {modality: SHAPES[modality]}
    plan = {modality: SCHEDULE[modality]}
    both = [context, with_ring_cache(context)]
    one, other = (
        join_chunks(
            c.clean
            for c in rollout(
                some,
                noise_starts(TIMELINE, shapes, range(6), seed=0, samples=data.samples, like=data.cond.caption),
                plan,
            )
        )
        for some in both
    )
    assert_same(one, other)


@torch.no_grad()
def test_guidance_uses_a_separate_ring_per_branch():
    model, data = network(), batch()
    context = DenoiserContext(model=model, cond=data.cond, guidance=3.0)
    plain = join_chunks(c.clean for c in rollout(context, starts(data), SCHEDULE))
    assert_same(streamed(context, data), plain, 1e-4)  # guidance amplifies rounding, chunk after chunk


@torch.no_grad()
def test_streaming_allocates_no_memory_after_the_start():
    model, data = network(window=3), batch()
    context = with_ring_cache(DenoiserContext(model=model, cond=data.cond))
    ring = context.cache
    assert isinstance(ring, RingKVCache)
    storage = (ring.k.data_ptr(), ring.v.data_ptr(), ring.num_bytes)
    held: list[int] = []
    for chunk in rollout(context, starts(data, chunks=40), SCHEDULE):
        assert chunk.before.cache is ring
        assert (ring.k.data_ptr(), ring.v.data_ptr(), ring.num_bytes) == storage
        held.append(0 if ring.past_positions is None else len(ring.past_positions))
    assert held[0] == 0 and max(held) <= 3 * MAX_TOKENS and min(held[4:]) >= 3 * (MAX_TOKENS - 1)


@torch.no_grad()
def test_a_snapshot_can_be_continued_more_than_once():
    model, data = network(), batch()
    context = DenoiserContext(model=model, cond=data.cond, guidance=2.0)
    whole = streamed(context, data)
    chunks = rollout(with_ring_cache(context), starts(data), SCHEDULE)
    for _ in range(5):
        chunk = next(chunks)
    kept = chunk.context.snapshot()
    rest = [join_chunks(c.clean for c in chunks)]
    for _ in range(2):
        again = rollout(with_ring_cache(kept), starts(data, 5, CHUNKS - 5), SCHEDULE)
        rest.append(join_chunks(c.clean for c in again))
    for m in whole:
        late = whole[m].chunk >= 5
        assert torch.equal(rest[0][m].latents, whole[m].latents[:, late])
        for own in rest[1:]:
            torch.testing.assert_close(own[m].latents, whole[m].latents[:, late], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rings_can_be_indexed_and_stacked():
    model, data = network(), batch(rows=3)
    context = with_ring_cache(DenoiserContext(model=model, cond=data.cond))
    whole = [c.clean for c in rollout(context, starts(data), SCHEDULE)]
    parts = [with_ring_cache(DenoiserContext(model=model, cond=data.cond)).rows(torch.tensor(i)) for i in ([2], [0, 1])]
    joined = DenoiserContext.stack(parts)
    assert isinstance(joined.cache, RingKVCache)
    order = torch.tensor([2, 0, 1])
    mixed = [{m: s.rows(order) for m, s in start.items()} for start in starts(data)]
    again = [c.clean for c in rollout(joined, mixed, SCHEDULE)]
    assert_same({m: s.rows(order) for m, s in join_chunks(whole).items()}, join_chunks(again))


@torch.no_grad()
def test_streaming_at_hour_three_equals_streaming_at_time_zero():
    """Shift by three hours, a whole number of chunks (0.5 s) and of audio latents (64 ms)."""
    model, data = network(window=3), batch()
    early = streamed(DenoiserContext(model=model, cond=data.cond), data)
    first, hours = 21600, 10800.0
    cond = replace(data.cond, word_times=data.cond.word_times + hours)
    later = [
        {m: replace(s, chunk=s.chunk + first, times=s.times + hours) for m, s in start.items()}
        for start in starts(data)
    ]
    context = with_ring_cache(DenoiserContext(model=model, cond=cond))
    late = join_chunks(c.clean for c in rollout(context, later, SCHEDULE))
    assert_same(early, late)


@torch.no_grad()
def test_caption_and_transcript_may_change_between_chunks():
    """History keeps the old text; later chunks use the new one."""
    model, data = network(), batch()
    draw = torch.Generator().manual_seed(7)
    other = replace(
        data.cond,
        caption=torch.randn(data.cond.caption.shape, generator=draw),
        words=torch.randn(data.cond.words.shape, generator=draw),
        word_times=data.cond.word_times + 1.5,
    )
    context = DenoiserContext(model=model, cond=data.cond)
    conds = [data.cond] * 4 + [other] * (CHUNKS - 4)
    plain = join_chunks(c.clean for c in rollout(context, starts(data), SCHEDULE, conds=conds))
    ring, same = streamed(context, data, conds=conds), streamed(context, data)
    assert_same(ring, plain, 3e-5)
    for m in ring:
        late = ring[m].chunk >= 4
        assert torch.equal(ring[m].latents[:, ~late], same[m].latents[:, ~late])
        assert not torch.allclose(ring[m].latents[:, late], same[m].latents[:, late], atol=1e-2)


@torch.no_grad()
def test_a_change_of_the_caption_alone_has_an_effect():
    model, data = network(), batch()
    context = DenoiserContext(model=model, cond=data.cond)
    other = replace(data.cond, caption=-data.cond.caption)
    conds = [data.cond] * 3 + [other] * (CHUNKS - 3)
    changed, same = streamed(context, data, conds=conds), streamed(context, data)
    assert not torch.allclose(changed[VIDEO].latents, same[VIDEO].latents, atol=1e-2)


def test_a_ring_rejects_passes_with_gradient():
    model, data = network(), batch()
    with torch.no_grad():
        context = with_ring_cache(DenoiserContext(model=model, cond=data.cond))
    start = next(iter(starts(data)))
    t = {m: torch.ones(2, 1) for m in start}
    with pytest.raises(AssertionError, match="run it without gradient"):
        context.velocity(start, t, t)


@torch.no_grad()
def test_a_chunk_larger_than_the_ring_allows_is_rejected():
    model, data = network(), batch()
    context = DenoiserContext(model=model, cond=data.cond).prefill().map_caches(lambda cache: to_ring_cache(cache, 5))
    with pytest.raises(ValueError, match="at most 5 tokens"):
        list(rollout(context, starts(data), SCHEDULE))
