"""Clip loader: each row group is read once per epoch and rank, in bounded memory, during the training step."""

from bisect import bisect_right
from threading import Barrier, Event

import numpy as np
import pytest

from preprocessing.io.prefetch import prefetch
from tests.helpers.memory_clips import RowGroupClips
from workflows.data.batch_sampler import BucketBatchSampler, make_buckets
from workflows.data.clip_loader import RowGroupLoader

BATCH, SHUFFLE, GROUP, COUNT = 12, 8, 8, 384  # four windows per epoch
WAIT = 20.0  # seconds until a test that hangs fails


def clips_in_row_groups(mixed: bool) -> RowGroupClips:
    draw = np.random.default_rng(5)
    lengths = [3] * COUNT if not mixed else draw.choice([2, 3, 4], COUNT, p=[0.2, 0.2, 0.6]).tolist()
    return RowGroupClips(lengths, [1 if i // GROUP % 4 else 2 for i in range(COUNT)] if mixed else [1] * COUNT, GROUP)


def loader(source: RowGroupClips, rank: int = 0, world: int = 1) -> tuple[RowGroupLoader, BucketBatchSampler]:
    clips = source.clips()
    order = BucketBatchSampler(
        make_buckets(clips.lengths, clips.shapes, min_chunks=2, max_chunks=4, batch=BATCH),
        clips.groups,
        batch=BATCH,
        shuffle=SHUFFLE,
        seed=0,
    )
    return RowGroupLoader(clips.load, order, slice(rank * BATCH // world, (rank + 1) * BATCH // world)), order


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_row_group_is_read_once_per_epoch_and_rank(world, mixed):
    for rank in range(world):
        source = clips_in_row_groups(mixed)
        made, order = loader(source, rank, world)
        ends = [sum(epoch * len(b.clips) // BATCH for b in order.buckets) for epoch in range(1, 6)]
        for step in range(ends[-1]):
            ids = [clip.id for clip in made.load_step(step)]
            row = rank * BATCH // world
            assert ids == [f"clip-{order.clip_at(step, row + i)}" for i in range(len(ids))]
            epoch = bisect_right(ends, step)
            ahead = order.window(step).steps.stop in ends  # the last window of an epoch: the next one's first is read
            assert max(source.read.values()) <= epoch + 1 + ahead
            assert sum(source.read.values()) <= (epoch + 1 + 0.3 * ahead) * COUNT / GROUP


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_a_rank_buffers_about_one_window_of_its_clips(world, mixed):
    made, order = loader(clips_in_row_groups(mixed), 0, world)
    waiting = len(order.buckets) * BATCH  # clips of buckets that had no whole batch
    for step in range(100):
        made.load_step(step)
        assert made.num_buffered <= 1.25 * SHUFFLE * BATCH / world + waiting


def test_reading_is_spread_evenly_over_the_steps():
    source = clips_in_row_groups(False)
    made, order = loader(source)
    reads = []
    for step in range(96):
        before = sum(source.read.values())
        made.load_step(step)
        reads.append(sum(source.read.values()) - before)
    assert max(reads[len(order.window(0).tickets) :]) <= -(-BATCH // GROUP), (
        "after the first window, which comes at once"
    )


def test_steps_can_be_loaded_in_any_order():
    straight, _ = loader(clips_in_row_groups(True))
    ids = [[clip.id for clip in straight.load_step(step)] for step in range(70)]
    jumping, _ = loader(clips_in_row_groups(True))
    for step in (33, 34, 35, 69, 0, 34, 34, 68, 69):
        assert [clip.id for clip in jumping.load_step(step)] == ids[step]


def test_prefetch_keeps_the_order_and_raises_errors():
    assert list(prefetch((i * i for i in range(3, 8)), lambda _: 1, 2)) == [9, 16, 25, 36, 49]

    def fail(i: int) -> int:
        if i == 5:
            raise ValueError("row 5 is broken")
        return i

    with pytest.raises(ValueError, match="row 5"):
        list(prefetch((fail(i) for i in range(3, 8)), lambda _: 1, 2))


def test_prefetch_overlaps_with_the_consumer():
    """Batch i + 1 is made while step i trains: each waits for the other to be under way, alone neither would end."""
    both = Barrier(2)

    def make(i: int) -> int:
        if i > 0:
            both.wait(WAIT)
        return i

    for i in prefetch((make(i) for i in range(6)), lambda _: 1, 1):
        if i < 5:
            both.wait(WAIT)


def test_prefetch_makes_no_more_batches_than_requested():
    made: list[int] = []
    enough = Event()

    def make(i: int) -> int:
        made.append(i)
        if i == 4:
            enough.set()
        return i

    batches = prefetch((make(i) for i in range(100)), lambda _: 1, 3)
    assert next(batches) == 0
    assert enough.wait(WAIT), "three wait, one more is made, with the step still at the first"
    assert not Event().wait(0.3) and made == [0, 1, 2, 3, 4]
    batches.close()
