"""The global batch depends on seed and samples seen alone."""

import pytest
import torch

from mfcore.types import AUDIO, VIDEO, AVBatch
from tests.workflows.clips import ASSEMBLY, STATS, TIMELINE, clips
from workflows.data import (
    FILLER,
    HELD_OUT_FIRST,
    Clips,
    DataConfig,
    Share,
    TrainingBatches,
    drop_conditions,
    held_out_batches,
    prefetched,
)

CONFIG = DataConfig(batch=4, chunks=(3, 6))


def _batches(rank: int = 0, world: int = 1, count: int = 10, config: DataConfig = CONFIG) -> TrainingBatches:
    return TrainingBatches(clips(count), ASSEMBLY, config, 7, Share(rank=rank, world=world))


def _same(a: AVBatch, b: AVBatch) -> bool:
    streams = all(torch.equal(a.streams[m].latents, b.streams[m].latents) for m in a.streams)
    width = min(a.cond.words.shape[1], b.cond.words.shape[1])
    words = torch.equal(a.cond.words[:, :width], b.cond.words[:, :width])
    others = all(torch.equal(getattr(a.cond, k), getattr(b.cond, k)) for k in ("first_frame", "voice", "voice_mask"))
    return streams and words and others and torch.equal(a.samples, b.samples)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_global_batch(world):
    for step in (0, 3, 9):
        (whole,) = _batches().step(step)
        size = CONFIG.batch // world
        for rank in range(world):
            (part,) = _batches(rank, world).step(step)
            assert _same(part, whole.rows(slice(rank * size, (rank + 1) * size)))


def test_a_batch_does_not_depend_on_what_was_read_before():
    straight = _batches()
    run = [straight.step(step)[0] for step in range(8)]
    resumed = _batches().step(5)[0]
    assert _same(resumed, run[5])
    assert _same(_batches(config=DataConfig(batch=4, chunks=(3, 6), micro=1)).step(5)[2], run[5].rows(slice(2, 3)))


def test_every_epoch_reads_every_clip_once():
    seen: list[str] = []
    source = clips(10)
    spy = Clips(lengths=source.lengths, read=lambda i: seen.append(source.read(i).id) or source.read(i))
    batches = TrainingBatches(spy, ASSEMBLY, CONFIG, 7, Share(rank=0, world=1))
    for step in range(5):
        batches.step(step)
    everything = {f"clip-{i}" for i in range(10)}
    assert set(seen[:10]) == everything == set(seen[10:])
    assert seen[:10] != seen[10:], "another permutation in another epoch"


def test_lengths_are_drawn_within_the_range_and_the_clips():
    lengths = {_batches(count=3).step(step)[0].chunks for step in range(40)}
    assert lengths == {3, 4, 5, 6}
    with pytest.raises(ValueError, match="holds 9 chunks"):
        _batches(config=DataConfig(batch=4, chunks=(9, 12)))


def test_latents_are_whitened_with_the_given_statistics():
    batch = ASSEMBLY.batch([clips(1).read(0)], 3, torch.tensor([0]), 0)
    clip = clips(1).read(0)
    n = TIMELINE.count(VIDEO, 3)
    assert torch.allclose(batch.streams[VIDEO].latents[0] * 2 + 1, clip.video[1 : 1 + n], atol=1e-6)
    assert torch.allclose(batch.cond.first_frame[0] * 4 + 3, clip.video[0], atol=1e-6)
    assert torch.equal(batch.streams[AUDIO].times, TIMELINE.times(AUDIO, 3))
    voice = STATS[AUDIO].restore(batch.cond.voice[0])
    rest = clip.audio[TIMELINE.count(AUDIO, 3) :]
    assert any(torch.allclose(voice, rest[i : i + len(voice)], atol=1e-6) for i in range(len(rest))), "unseen sound"


def test_conditions_are_dropped_as_often_as_asked():
    rows = 4000
    batch = ASSEMBLY.batch([clips(2).read(1)] * rows, 1, torch.arange(rows), 0)
    config = DataConfig(batch=4, chunks=(1, 2), drop_both=0.1, drop_caption=0.2, drop_words=0.05, drop_voice=0.3)
    cond = drop_conditions(batch, config, 0).cond
    caption, words = cond.caption_mask.any(-1), cond.words_mask.any(-1)
    shares = [(~caption & ~words), (~caption & words), (caption & ~words), ~cond.voice_mask]
    assert [float(s.float().mean()) for s in shares] == pytest.approx([0.1, 0.2, 0.05, 0.3], abs=0.02)


def test_the_evaluation_is_the_same_on_any_number_of_ranks():
    def numbers(world: int) -> list[int]:
        parts = [held_out_batches(clips(6), ASSEMBLY, CONFIG, 7, Share(rank=r, world=world)) for r in range(world)]
        assert len({len(part) for part in parts}) == 1, "every rank makes as many calls"
        return [int(s) - HELD_OUT_FIRST for part in parts for b in part for s in b.samples if s != FILLER]

    assert numbers(1) == numbers(2) == numbers(3) == numbers(4) == list(range(6))


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        _batches(0, 3)


def test_prefetching_keeps_the_order_and_hands_over_errors():
    assert list(prefetched(lambda i: i * i, 3, 8, 2)) == [9, 16, 25, 36, 49]

    def fail(i: int) -> int:
        if i == 5:
            raise ValueError("row 5 is broken")
        return i

    with pytest.raises(ValueError, match="row 5"):
        list(prefetched(fail, 3, 8, 2))
