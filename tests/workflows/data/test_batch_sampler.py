"""Batch order: each clip once per epoch, well mixed, one shape per batch, few row groups per rank."""

from collections import Counter

import numpy as np
import pytest

from workflows.data.batch_sampler import BucketBatchSampler, make_buckets

GROUP = 16


def order(lengths, batch, *, shapes=None, shuffle=8, seed=3, least=3, most=16, group=GROUP) -> BucketBatchSampler:
    buckets = make_buckets(lengths, shapes or [None] * len(lengths), min_chunks=least, max_chunks=most, batch=batch)
    groups = [i // group for i in range(len(lengths))]
    return BucketBatchSampler(buckets, groups, batch=batch, shuffle=shuffle, seed=seed)


def batches(made: BucketBatchSampler, steps: range) -> list[np.ndarray]:
    windows = [made.window(step) for step in steps]
    return [w.tickets[step - w.first] for w, step in zip(windows, steps, strict=True)]


def random_case(number: int):
    draw = np.random.default_rng(number)
    count, batch = int(draw.integers(1, 200)), int(draw.integers(1, 24))
    lengths = np.where(draw.random(count) < 0.6, 16, draw.integers(1, 17, count)).tolist()
    lengths[0] = 16
    shapes = [(8, 8) if i // GROUP % 3 else (4, 12) for i in range(count)]  # a file, so a row group, has one shape
    return order(lengths, batch, shapes=shapes, shuffle=int(draw.integers(1, 9))), lengths, shapes, batch


@pytest.mark.parametrize("number", range(40))
def test_every_clip_comes_once_per_epoch_of_its_bucket(number):
    """Random lengths, shapes, batch sizes and windows: no clip is skipped or repeated."""
    made, lengths, _, batch = random_case(number)
    usable = [i for i, length in enumerate(lengths) if length >= 3]
    assert sorted(i for b in made.buckets for i in b.clips.tolist()) == usable, "every usable clip has one bucket"
    of = {i: b for b, bucket in enumerate(made.buckets) for i in bucket.clips.tolist()}
    used: list[list[int]] = [[] for _ in made.buckets]
    for tickets in batches(made, range(5 * len(usable) // batch + 20)):
        used[of[int(made.clip_index(tickets[0]))]] += tickets.tolist()
    for bucket, tickets in zip(made.buckets, used, strict=True):
        size = len(bucket.clips)
        for epoch in range(len(tickets) // size):
            part = np.array(tickets[epoch * size : (epoch + 1) * size])
            assert sorted(part - epoch * len(lengths)) == bucket.clips.tolist(), "use i belongs to epoch i // size"
        assert len(set(tickets)) == len(tickets)


@pytest.mark.parametrize("number", range(20))
def test_a_batch_has_one_shape_and_clips_of_at_least_its_length(number):
    made, lengths, shapes, batch = random_case(number)
    for step, tickets in enumerate(batches(made, range(40))):
        numbers = made.clip_index(tickets).tolist()
        assert len(numbers) == batch
        assert len({shapes[i] for i in numbers}) == 1
        assert min(lengths[i] for i in numbers) >= made.chunks(step) >= 3


@pytest.mark.parametrize("number", range(10))
def test_any_step_is_computed_without_earlier_steps(number):
    made, _, _, _ = random_case(number)
    straight = batches(made, range(60))
    for step in (59, 0, 31, 30):
        fresh, _, _, _ = random_case(number)
        assert np.array_equal(batches(fresh, range(step, step + 1))[0], straight[step])
    assert made.clip_at(7, 0) == made.clip_index(straight[7][:1])[0]


def test_long_clips_are_used_long():
    """One short clip in ten: nearly every use of a long clip is as long as drawn."""
    lengths = [16 if i % 10 else 4 for i in range(640)]
    made = order(lengths, 16)
    allowed = Counter(made.chunks(step) for step in range(40))
    assert allowed == {16: 36, 4: 4}
    rare = make_buckets([16] * 50 + [12, 11, 10, 9, 8, 7], [None] * 56, min_chunks=3, max_chunks=16, batch=4)
    assert [(len(b.clips), b.chunks) for b in rare] == [(50, 16), (4, 9), (2, 7)], "rare lengths share a bucket"
    few = make_buckets([20, 16, 8], [None] * 3, min_chunks=3, max_chunks=16, batch=2)
    assert [(len(b.clips), b.chunks) for b in few] == [(2, 16), (1, 8)]
    uneven = make_buckets([16, 5], [None] * 2, min_chunks=3, max_chunks=16, batch=2)
    assert uneven[0].chunks == 16, "no clip gives up more than half"


def test_clips_are_mixed():
    """As a perfect shuffle within 3 standard errors: positions between epochs, neighbours in a batch, nearby steps."""
    count, batch, shuffle = 8192, 32, 32
    made = order([16] * count, batch, shuffle=shuffle)
    epochs = [made.clip_index(np.concatenate(batches(made, range(e * 256, (e + 1) * 256)))) for e in range(3)]
    places = [np.argsort(clips) for clips in epochs]  # of every clip
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(places[a], places[b])[0, 1]) < 3 / np.sqrt(count / GROUP), "row groups move together"
    assert abs(np.corrcoef(places[0], np.arange(count))[0, 1]) < 3 / np.sqrt(count / GROUP)
    rows = [clips.reshape(-1, batch) for clips in epochs]
    together = [_same_group_pairs(r) for r in rows]
    assert max(together) <= 0.5 * batch * (batch - 1) * GROUP / count * 1.1, "no more than chance has it in one batch"
    kept = len(_pairs(rows[0]) & _pairs(rows[1])) / len(_pairs(rows[0]))
    assert kept < 2 * (batch - 1) / count, (
        "two clips of a batch meet again no more than twice as often as chance has it"
    )
    steps = np.sort(places[0].reshape(-1, GROUP) // batch, axis=1)
    assert (steps[:, -1] - steps[:, 0]).mean() > shuffle / 2, "a row group's clips are spread over a window's steps"


def _same_group_pairs(rows: np.ndarray) -> float:
    """Pairs of clips of one row group in a batch, on average."""
    sizes = [Counter((row // GROUP).tolist()).values() for row in rows]
    return float(np.mean([sum(n * (n - 1) / 2 for n in s) for s in sizes]))


def _pairs(rows: np.ndarray) -> set[tuple[int, int]]:
    return {(a, b) for row in np.sort(rows, axis=1).tolist() for i, a in enumerate(row) for b in row[i + 1 :]}


@pytest.mark.parametrize(("world", "limit"), [(1, 1.01), (2, 1.03), (4, 1.05), (16, 1.3)])
def test_most_row_groups_are_read_by_one_rank(world, limit):
    """Compare the row groups read by all ranks in an epoch with their number; random rows give about ``world``."""
    made = order([16] * 8192, 64, shuffle=32)
    tickets = np.stack(batches(made, range(128)))
    parts = [tickets[:, r * 64 // world : (r + 1) * 64 // world] for r in range(world)]
    assert sum(len(np.unique(made.row_group_index(part))) for part in parts) / 512 <= limit
