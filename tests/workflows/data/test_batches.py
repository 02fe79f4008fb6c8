"""The global batch depends only on the seed and the samples seen."""

import pytest
import torch

from mfcore.rng import PADDING_SAMPLE, VALIDATION_SAMPLE_OFFSET
from mfcore.types import AUDIO, VIDEO, AVBatch
from tests.helpers.memory_clips import ASSEMBLY, STATS, TIMELINE, FakeClip, RowGroupClips, clips
from workflows.config.run import DataConfig
from workflows.data.batches import RankShard, TrainingBatchLoader, validation_batches
from workflows.data.collate import apply_condition_dropout

CONFIG = DataConfig(batch=4, chunks=(3, 6))


def _batches(rank: int = 0, world: int = 1, count: int = 10, config: DataConfig = CONFIG) -> TrainingBatchLoader:
    return TrainingBatchLoader(clips(count), ASSEMBLY, config, seed=7, shard=RankShard(rank=rank, world=world))


def _same(a: AVBatch, b: AVBatch) -> bool:
    streams = all(torch.equal(a.streams[m].latents, b.streams[m].latents) for m in a.streams)
    width = min(a.cond.words.shape[1], b.cond.words.shape[1])
    words = torch.equal(a.cond.words[:, :width], b.cond.words[:, :width])
    others = all(torch.equal(getattr(a.cond, k), getattr(b.cond, k)) for k in ("first_frame", "voice", "voice_mask"))
    return streams and words and others and torch.equal(a.samples, b.samples)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rank_shards_form_the_global_batch(world):
    """For any number of ranks: 4 rows over 3 ranks are 1, 1 and 2."""
    for step in (0, 3, 9):
        (whole,) = _batches().micro_batches(step)
        for rank in range(world):
            (part,) = _batches(rank, world).micro_batches(step)
            assert _same(part, whole.rows(slice(rank * 4 // world, (rank + 1) * 4 // world)))


@pytest.mark.parametrize(
    ("batch", "micro", "unit"), [(12, None, 1), (13, 3, 1), (7, 1, 1), (9, 2, 1), (24, 4, 4), (16, 8, 4)]
)
def test_every_rank_has_the_same_number_of_micro_batches(batch, micro, unit):
    """ZeRO 3 hangs unless all ranks call the network equally often, also with uneven shards."""
    for world in range(1, min(5, batch // unit) + 1):
        parts = [RankShard(rank=r, world=world, unit=unit).micro_batches(batch, micro) for r in range(world)]
        assert len({len(part) for part in parts}) == 1
        rows = [slice(p.start, p.stop) for part in parts for p in part]
        assert [i for r in rows for i in range(batch)[r]] == list(range(batch)), "every row once, in order"
        sizes = [r.stop - r.start for r in rows]
        assert min(sizes) >= unit and all(size % unit == 0 for size in sizes)
        assert max(sizes) <= (micro or batch) + unit * (micro == unit), "at most one unit more where micro is one unit"
    assert RankShard(rank=1, world=2, unit=4).rows(24) == slice(12, 24)


def test_a_batch_does_not_depend_on_earlier_batches():
    straight = _batches()
    run = [straight.micro_batches(step)[0] for step in range(8)]
    resumed = _batches().micro_batches(5)[0]
    assert _same(resumed, run[5])
    assert _same(
        _batches(config=DataConfig(batch=4, chunks=(3, 6), micro=1)).micro_batches(5)[2], run[5].rows(slice(2, 3))
    )


def test_every_epoch_reads_every_clip_once():
    source = RowGroupClips([6] * 10, [4] * 10, group=4)
    batches = TrainingBatchLoader(source.clips(), ASSEMBLY, CONFIG, seed=7, shard=RankShard(rank=0, world=1))
    seen = [name for step in range(5) for name in batches.clip_ids(batches.micro_batches(step)[0].samples)]
    everything = {f"clip-{i}" for i in range(10)}
    assert set(seen[:10]) == everything == set(seen[10:]), "with a batch that spans the border"
    assert seen[:10] != seen[10:], "another permutation in another epoch"


def test_clip_ids_are_those_of_the_rows():
    source = RowGroupClips([3, 4, 5, 6] * 6, [4, 4, 4, 4, 2, 2, 2, 2] * 3, group=4)
    for world in (1, 3):
        batches = TrainingBatchLoader(source.clips(), ASSEMBLY, CONFIG, seed=7, shard=RankShard(rank=0, world=world))
        for step in range(12):
            (batch,) = batches.micro_batches(step)
            for i, name in enumerate(batches.clip_ids(batch.samples)):
                clip = source.made[int(name.removeprefix("clip-"))]
                latents = STATS[AUDIO].whiten(clip.audio[: batch.streams[AUDIO].latents.shape[1]])
                assert torch.equal(batch.streams[AUDIO].latents[i], latents)
                assert batch.streams[VIDEO].latents.shape[-1] == clip.video.shape[-1], "one shape"


def test_lengths_are_drawn_per_step_and_short_clips_do_not_shorten_long_ones():
    lengths = {_batches(count=3).micro_batches(step)[0].chunks for step in range(40)}
    assert lengths == {3, 4, 5, 6}
    source = RowGroupClips([3] * 20 + [6] * 20, [4] * 40, group=4)
    batches = TrainingBatchLoader(source.clips(), ASSEMBLY, CONFIG, seed=7, shard=RankShard(rank=0, world=1))
    drawn = {"short": set(), "long": set()}
    for step in range(60):
        (batch,) = batches.micro_batches(step)
        kinds = {"short" if int(n.removeprefix("clip-")) < 20 else "long" for n in batches.clip_ids(batch.samples)}
        drawn[kinds.pop()].add(batch.chunks)
        assert not kinds, "a batch has clips of one length"
    assert drawn == {"short": {3}, "long": {3, 4, 5, 6}}
    with pytest.raises(ValueError, match="holds 9 chunks"):
        _batches(config=DataConfig(batch=4, chunks=(9, 12)))


def test_a_short_clip_does_not_shorten_the_evaluation():
    source = RowGroupClips([3, 7, 7, 4, 7, 7], [4, 4, 4, 4, 2, 4], group=1)
    config = DataConfig(batch=4, chunks=(3, 6), held_out_clips=3)
    (batch,) = validation_batches(source.clips(), ASSEMBLY, config, seed=7, shard=RankShard(rank=0, world=1))
    assert batch.chunks == 6
    assert len(batch.samples) == 3


def test_latents_are_whitened_with_the_given_statistics():
    batch = ASSEMBLY.collate([clips(1).read(0)], 3, torch.tensor([0]), 0)
    clip = clips(1).read(0)
    n = TIMELINE.count(VIDEO, 3)
    assert torch.allclose(batch.streams[VIDEO].latents[0] * 2 + 1, clip.video[1 : 1 + n], atol=1e-6)
    assert torch.allclose(batch.cond.first_frame[0] * 4 + 3, clip.video[0], atol=1e-6)
    assert torch.equal(batch.streams[AUDIO].times, TIMELINE.times(AUDIO, 3))
    voice = STATS[AUDIO].restore(batch.cond.voice[0])
    rest = clip.audio[TIMELINE.count(AUDIO, 3) :]
    assert any(torch.allclose(voice, rest[i : i + len(voice)], atol=1e-6) for i in range(len(rest))), "unseen sound"


def _targets_of_voice(latents: torch.Tensor, voice: torch.Tensor) -> bool:
    """Return True if the latents (n, C) contain the voice (m, C) as consecutive latents."""
    runs = latents.unfold(0, len(voice), 1).transpose(1, 2) if len(latents) >= len(voice) else latents[:0, None]
    return bool((runs == voice).flatten(1).all(1).any())


@pytest.mark.parametrize("length", range(1, 13))
def test_the_voice_is_never_part_of_the_target(length):
    """For all clip lengths and chunk counts. Rows without other sound have no voice."""
    clip, rows = FakeClip(length, length), 16
    left = len(clip.audio)
    for chunks in range(1, length + 1):
        batch = ASSEMBLY.collate([clip] * rows, chunks, torch.arange(rows), 0)
        stream = batch.streams[AUDIO].latents
        for latents, voice, given in zip(stream, batch.cond.voice, batch.cond.voice_mask.tolist(), strict=True):
            assert not _targets_of_voice(latents, voice)
            assert given == (left - len(latents) >= len(voice)), "a voice wherever there is sound for one"
            assert given or not voice.any()
    held = ASSEMBLY.collate([clip], 1, torch.tensor([0]), 0, target_chunks=length)
    assert not held.cond.voice_mask.any(), "target of a sample that is longer than the collated chunks"


def test_training_and_held_out_batches_hide_the_target_from_the_voice():
    config = DataConfig(batch=4, chunks=(3, 9), held_out_clips=8, drop_voice=0.0)
    source = RowGroupClips([3, 4, 6, 7, 8] * 4, [4] * 20, group=1)
    loader = TrainingBatchLoader(source.clips(), ASSEMBLY, config, seed=7, shard=RankShard(rank=0, world=1))
    seen = [loader.micro_batches(step)[0] for step in range(40)]
    assert {bool(b.cond.voice_mask.any()) for b in seen} == {True, False}
    shard = RankShard(rank=0, world=1)
    for lengths in ([7, 8, 9], [6, 6], [3, 3], [12, 12]):
        held = RowGroupClips(lengths, [4] * len(lengths), group=1).clips()
        (batch,) = validation_batches(held, ASSEMBLY, config, seed=7, shard=shard)
        assert bool(batch.cond.voice_mask.all()) == (lengths != [3, 3]), "the held-out loss is one with a voice"
        assert batch.chunks >= 3
        seen.append(batch)
    for batch in seen:
        for latents, voice in zip(batch.streams[AUDIO].latents, batch.cond.voice, strict=True):
            assert not _targets_of_voice(latents, voice)


def test_conditions_are_dropped_at_the_configured_rates():
    rows = 4000
    batch = ASSEMBLY.collate([clips(2).read(1)] * rows, 1, torch.arange(rows), 0)
    config = DataConfig(batch=4, chunks=(1, 2), drop_both=0.1, drop_caption=0.2, drop_words=0.05, drop_voice=0.3)
    cond = apply_condition_dropout(batch, config, 0).cond
    caption, words = cond.caption_mask.any(-1), cond.words_mask.any(-1)
    shares = [(~caption & ~words), (~caption & words), (caption & ~words), ~cond.voice_mask]
    assert [float(s.float().mean()) for s in shares] == pytest.approx([0.1, 0.2, 0.05, 0.3], abs=0.02)


def test_the_evaluation_is_the_same_on_any_number_of_ranks():
    def numbers(world: int) -> list[int]:
        parts = [
            validation_batches(clips(6), ASSEMBLY, CONFIG, seed=7, shard=RankShard(rank=r, world=world))
            for r in range(world)
        ]
        assert len({len(part) for part in parts}) == 1, "every rank makes as many calls"
        return [
            int(s) - VALIDATION_SAMPLE_OFFSET for part in parts for b in part for s in b.samples if s != PADDING_SAMPLE
        ]

    assert numbers(1) == numbers(2) == numbers(3) == numbers(4) == list(range(6))


def test_a_shard_without_rows_is_rejected():
    with pytest.raises(ValueError, match="at least 5"):
        _batches(0, 5)
    with pytest.raises(ValueError, match="multiple of 4"):
        RankShard(rank=0, world=1, unit=4).rows(6)
