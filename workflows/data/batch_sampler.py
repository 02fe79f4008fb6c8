"""Order of the training clips: a pure function of (seed, step), for datasets larger than memory.

**Buckets.** A batch holds clips of one latent shape and one length, so no clip is cut to the length of another.
**Epoch.** Every epoch permutes the row groups. The clips of a bucket queue in that order, shuffled within a row group.
The queue continues across epochs: a remainder smaller than a batch begins a batch that the next epoch completes. Use
number i of a bucket with n clips therefore belongs to epoch ``i // n``, and each epoch contains each clip once.
**Window.** The row groups of an epoch are split into windows of about ``shuffle`` batches. A window yields the whole
batches that are in the queues by then, in random order.
**Rows.** Suppose q batches of a window come from one bucket. Their clips are sorted by reading position and cut into
``batch`` runs of q. Row j of the q batches is run j in random order. A batch thus mixes clips from the whole window.
The clips of a row group go to different batches but to the same few rows. For any number of ranks, most row groups
are read by one rank, once, and a rank stores only its own clips of a window.

No draw depends on earlier draws: the batch of a step is computed without the batches before it.

Letters: B clips per batch, M batches of a window, n clips of a dataset. A *ticket*, ``epoch * n + clip``, is the use of
a clip in an epoch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from mfcore.rng import generator

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
MAX_SHORTENED_SHARE = 0.5  # of the chunks of a clip with a rare length, cut to fill a bucket of a whole batch


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips that may share a batch."""

    clips: IntArray  # clip numbers, ascending
    chunks: int  # whole chunks in every clip


def make_buckets(
    lengths: Sequence[int], shapes: Sequence[Hashable], *, min_chunks: int, max_chunks: int, batch: int
) -> list[Bucket]:
    """Group the clips of at least ``min_chunks`` chunks by shape and length; lengths are capped at ``max_chunks``.

    Fewer than ``batch`` clips of one length join the next shorter ones of their shape (see MAX_SHORTENED_SHARE).
    """
    found: dict[tuple[str, int], list[int]] = {}
    for i, (length, shape) in enumerate(zip(lengths, shapes, strict=True)):
        if length >= min_chunks:
            found.setdefault((str(shape), min(length, max_chunks)), []).append(i)
    merged: list[tuple[str, int, int, list[int]]] = []  # shape, longest, shortest, clips
    for (shape, length), clips in sorted(found.items(), reverse=True):
        if merged and merged[-1][0] == shape:
            _, longest, _, longer = merged[-1]
            if len(longer) < batch and length >= (1 - MAX_SHORTENED_SHARE) * longest:
                merged[-1] = (shape, longest, length, longer + clips)
                continue
        merged.append((shape, length, length, clips))
    return [Bucket(clips=np.array(sorted(clips)), chunks=shortest) for _, _, shortest, clips in merged]


@dataclass(frozen=True, kw_only=True)
class ShuffleWindow:
    """Consecutive steps with mixed clips."""

    first: int  # step of the first batch
    tickets: IntArray  # (M, B)
    chunks: IntArray  # (M,) whole chunks in every clip of a batch
    carried_over: IntArray  # tickets with a read row group and an incomplete batch

    @property
    def steps(self) -> range:
        """Steps of the batches in the window."""
        return range(self.first, self.first + len(self.tickets))


class BucketBatchSampler:
    """Deterministic batch order of a run; ``groups[i]``: row group of clip i, ``shuffle``: batches per window."""

    def __init__(
        self, buckets: Sequence[Bucket], groups: Sequence[int], *, batch: int, shuffle: int, seed: int
    ) -> None:
        self.buckets = list(buckets)
        self._groups = np.asarray(groups, np.int64)
        self._batch = batch
        self._seed = seed
        self._group_sizes = np.bincount(self._groups[np.concatenate([b.clips for b in buckets])])
        self._sizes = np.array([len(b.clips) for b in buckets])
        self._windows = max(1, round(int(self._sizes.sum()) / (shuffle * batch)))
        self._read_times = lru_cache(maxsize=4)(self._make_read_times)
        self._queue = lru_cache(maxsize=4 * len(buckets))(self._make_queue)
        self._queued = lru_cache(maxsize=4)(self._make_queued)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def clip_index(self, ticket: IntArray) -> IntArray:
        """Return the clip numbers of tickets."""
        return ticket % len(self._groups)

    def row_group_index(self, ticket: IntArray) -> IntArray:
        """Return a number per ticket; tickets with equal numbers are in one row group of one epoch."""
        epoch, clip = np.divmod(ticket, len(self._groups))
        return epoch * len(self._group_sizes) + self._groups[clip]

    def window(self, step: int) -> ShuffleWindow:
        """Return the window that contains ``step``."""
        epoch = step * self._batch // int(self._sizes.sum())  # lower bound: queues delay clips
        while self._steps_before(epoch + 1) <= step:
            epoch += 1
        number = int(np.searchsorted(self._first_steps(epoch), step, side="right")) - 1
        return self._window(epoch, number)

    def chunks(self, step: int) -> int:
        """Return the number of whole chunks in every clip of the batch of ``step``."""
        window = self.window(step)
        return int(window.chunks[step - window.first])

    def clip_at(self, step: int, row: int) -> int:
        """Return the clip number in a row of the batch of ``step``."""
        window = self.window(step)
        return int(self.clip_index(window.tickets[step - window.first, row]))

    def _make_window(self, epoch: int, number: int) -> ShuffleWindow:
        first = int(self._first_steps(epoch)[number])
        parts = [self._split_bucket(b, epoch, number, first) for b in range(len(self.buckets))]
        bucket = np.repeat(np.arange(len(parts)), [len(batches) for batches, _ in parts])
        bucket = bucket[torch.randperm(len(bucket), generator=self._generator("window", first)).numpy()]
        tickets = np.empty((len(bucket), self._batch), np.int64)
        for b, (batches, _) in enumerate(parts):
            tickets[bucket == b] = batches  # in order: a batch that completes an epoch comes first
        return ShuffleWindow(
            first=first,
            tickets=tickets,
            chunks=np.array([b.chunks for b in self.buckets])[bucket],
            carried_over=np.concatenate([later for _, later in parts]),
        )

    def _first_steps(self, epoch: int) -> IntArray:
        """Return the first step of each window of an epoch, and of the next epoch."""
        return (self._queued(epoch) // self._batch).sum(0)

    def _steps_before(self, epoch: int) -> int:
        """Return the number of steps before an epoch."""
        return int((epoch * self._sizes // self._batch).sum())

    def _split_bucket(self, bucket: int, epoch: int, window: int, first: int) -> tuple[IntArray, IntArray]:
        """Return the (q, B) tickets of a bucket that a window yields, and those of incomplete batches."""
        begin, end = (int(n) for n in self._queued(epoch)[bucket, window : window + 2])
        begin, whole = begin // self._batch * self._batch, end // self._batch * self._batch
        tickets = self._tickets(bucket, begin, end)
        batches = self._mix_rows(tickets[: whole - begin], epoch, self._generator(f"rows/{bucket}", first))
        return batches, tickets[whole - begin :]

    def _mix_rows(self, tickets: IntArray, epoch: int, draw: torch.Generator) -> IntArray:
        """Arrange q * B tickets as (q, B) by the row rule; tickets of earlier epochs begin the first batch."""
        old, new = tickets[tickets < epoch * len(self._groups)], tickets[tickets >= epoch * len(self._groups)]
        new = new[np.argsort(self._read_position(new, epoch), kind="stable")]
        missing = -len(old) % self._batch
        evenly = np.arange(missing) * len(new) // max(1, missing)
        runs = np.delete(new, evenly).reshape(self._batch, -1)
        mixed = torch.rand(runs.shape, generator=draw).argsort(1).numpy()
        spanning = np.concatenate([old, new[evenly]]).reshape(-1, self._batch)
        return np.concatenate([spanning, np.take_along_axis(runs, mixed, 1).T])

    def _tickets(self, bucket: int, begin: int, end: int) -> IntArray:
        """Return positions ``begin .. end - 1`` of a bucket's queue, which continues across epochs."""
        size, out = int(self._sizes[bucket]), [np.empty(0, np.int64)]
        for epoch in range(begin // size, (end - 1) // size + 1):
            part = self._queue(bucket, epoch)[max(0, begin - epoch * size) : end - epoch * size]
            out.append(part + epoch * len(self._groups))
        return np.concatenate(out)

    def _read_position(self, tickets: IntArray, epoch: int) -> FloatArray:
        """Return the position in its window, 0 to 1, at which the row group of each ticket is read."""
        return self._read_times(epoch)[self._groups[self.clip_index(tickets)]] % 1

    def _make_queue(self, bucket: int, epoch: int) -> IntArray:
        """Return the clips of a bucket in the order of an epoch."""
        clips = self.buckets[bucket].clips
        within = torch.rand(len(clips), generator=self._generator(f"clips/{bucket}", epoch)).numpy()
        return clips[np.lexsort((within, self._read_times(epoch)[self._groups[clips]]))]

    def _make_read_times(self, epoch: int) -> FloatArray:
        """Return the time at which an epoch reads each row group, in windows since its start."""
        order = torch.randperm(len(self._group_sizes), generator=self._generator("groups", epoch)).numpy()
        sizes = self._group_sizes[order]
        times = np.empty(len(order))
        times[order] = (sizes.cumsum() - sizes) * self._windows / sizes.sum()
        return times

    def _make_queued(self, epoch: int) -> IntArray:
        """Return (buckets, windows + 1): clips queued per bucket before each window, and by the end of the epoch."""
        times = self._read_times(epoch)
        rows = [
            np.searchsorted(times[self._groups[self._queue(b, epoch)]], np.arange(self._windows + 1))
            for b in range(len(self.buckets))
        ]
        return np.stack(rows) + epoch * self._sizes[:, None]

    def _generator(self, stream: str, index: int) -> torch.Generator:
        return generator(self._seed, f"order/{stream}", index)
