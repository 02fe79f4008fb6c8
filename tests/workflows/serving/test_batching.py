"""Clips of different age in one forward pass equal the clips alone."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from mfcore.rollout import join_chunks
from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO, Condition
from tests.helpers import tiny_model
from workflows.inference.sampling import SamplingParams
from workflows.serving.batching import ChunkSampler, stack_conditions

CHUNKS = 7


def sampler(audio_hop: int = 1000, params: SamplingParams | None = None) -> ChunkSampler:
    model = tiny_model.network(VIDEO, AUDIO)
    params = params or SamplingParams(steps=2)
    clocks = {VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(16000, audio_hop)}
    return ChunkSampler(
        model=model,
        config=model.config,
        timeline=Timeline(clocks=clocks, chunk_seconds=Fraction(1, 2)),
        shapes=tiny_model.SHAPES,
        levels=params.schedule({VIDEO: 3.0, AUDIO: 1.0}),
        params=params,
    )


def condition(row: int, words: int = 6, caption: int = 3) -> Condition:
    cond = tiny_model.batch(3).cond.rows(slice(row, row + 1))
    return replace(
        cond,
        caption=cond.caption[:, :caption],
        caption_mask=cond.caption_mask[:, :caption],
        words=cond.words[:, :words],
        words_mask=cond.words_mask[:, :words],
        word_times=cond.word_times[:, :words],
    )


CONDITIONS = [condition(0), condition(1, words=2), condition(2, caption=1)]


def alone(own: ChunkSampler, row: int):
    clip = own.start_row(CONDITIONS[row], seed=row)
    return join_chunks(own.advance_rows([clip])[0] for _ in range(CHUNKS))


@pytest.mark.parametrize(
    "params",
    [SamplingParams(steps=2), SamplingParams(steps=2, sampler="renoise"), SamplingParams(steps=4, sampler="mixed")],
    ids=lambda params: params.sampler,
)
def test_clips_that_join_at_any_chunk_equal_the_clips_alone(params):
    own = sampler(params=params)
    assert own.period == 1
    joins = [0, 2, 3]  # a clip per tick
    rows, made = {}, {0: [], 1: [], 2: []}
    shared = 0
    for tick in range(CHUNKS + max(joins)):
        rows |= {i: own.start_row(CONDITIONS[i], seed=i) for i, at in enumerate(joins) if at == tick}
        groups: dict[tuple[int, int], list[int]] = {}
        for i, row in rows.items():
            if len(made[i]) < CHUNKS:
                groups.setdefault(own.batch_key(row), []).append(i)
        for members in groups.values():
            shared += len(members) > 1
            for i, chunk in zip(members, own.advance_rows([rows[i] for i in members]), strict=True):
                made[i].append(chunk)
    assert shared >= 5  # the test is void if no pass has several rows
    for i, chunks in made.items():
        lone = alone(own, i)
        joined = {m: torch.cat([c[m].latents for c in chunks], dim=1) for m in lone}
        for m in lone:
            torch.testing.assert_close(joined[m], lone[m].latents, atol=2e-5, rtol=2e-5)


def test_clips_with_other_latents_per_chunk_do_not_share_a_pass():
    own = sampler(audio_hop=1024)
    assert own.period == 16
    young, old = own.start_row(CONDITIONS[0], seed=0), own.start_row(CONDITIONS[1], seed=1)
    young.chunk, old.chunk = 5, 6
    assert own.batch_key(young) != own.batch_key(old)
    old.chunk = 21
    assert own.batch_key(young) == own.batch_key(old)


def test_missing_tokens_are_masked():
    joined = stack_conditions(CONDITIONS)
    assert joined.words_mask.sum(1).tolist() == [6, 2, 6]
    assert joined.caption_mask.sum(1).tolist() == [3, 3, 1]
