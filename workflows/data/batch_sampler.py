"""In which order clips are trained on: a pure function of (seed, step), made for datasets that memory cannot hold.

**Buckets.** A batch holds clips of one latent shape and one length, so that no clip is cut to another's.
**Epoch.** Every epoch permutes the row groups; each bucket's clips queue up in that order, shuffled within a row group.
The queue runs on through the epochs: what is left at the end of one, less than a batch, begins a batch that the next
epoch completes. So use number i of a bucket with n clips belongs to epoch ``i // n``, and each clip comes once in it.
**Window.** The row groups of an epoch are cut into windows of about ``shuffle`` batches. A window gives out the whole
batches that the queues hold by then, in random order.
**Rows.** Say q of them come from one bucket. Their clips, by how far into a window they are read, are cut into
``batch`` runs of q; row j of the q batches is run j in random order. A batch thus has its clips from everywhere in the
window, and a row group's clips go to different batches, yet to the same few rows: at any number of ranks most row
groups are read by one rank, once, and holding a window costs each rank its own clips only.

No draw depends on what came before: the batch of any step is found without making those before it.

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
MAX_SHORTENED_SHARE = (
    0.5  # a clip of a rare length gives up at most this share of its chunks to make a bucket of a whole batch
)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Clips that may share a batch."""

    clips: IntArray  # clip numbers, ascending
    chunks: int  # whole chunks that each of them holds


def make_buckets(
    lengths: Sequence[int], shapes: Sequence[Hashable], *, min_chunks: int, max_chunks: int, batch: int
) -> list[Bucket]:
    """Buckets of clips with at least ``least`` chunks; what a clip holds beyond ``most`` makes no difference.

    Where fewer than ``batch`` clips have a length, they join the next shorter ones of their shape (see SHORTENED).
    """
    found: dict[tuple[str, int], list[int]] = {}
    for i, (length, shape) in enumerate(zip(lengths, shapes, strict=True)):
        if length >= min_chunks:
            found.setdefault((str(shape), min(length, max_chunks)), []).append(i)
    merged: list[tuple[str, int, int, list[int]]] = []  # shape, longest, shortest, clips
    for (shape, length), clips in sorted(found.items(), reverse=True):
        if merged and merged[-1][0] == shape:
            _, longest, _, waiting = merged[-1]
            if len(waiting) < batch and length >= (1 - MAX_SHORTENED_SHARE) * longest:
                merged[-1] = (shape, longest, length, waiting + clips)
                continue
        merged.append((shape, length, length, clips))
    return [Bucket(clips=np.array(sorted(clips)), chunks=shortest) for _, _, shortest, clips in merged]


@dataclass(frozen=True, kw_only=True)
class ShuffleWindow:
    """Consecutive steps whose clips are mixed with each other."""

    first: int  # step of the first batch
    tickets: IntArray  # (M, B)
    chunks: IntArray  # (M,) whole chunks in every clip of a batch
    carried_over: IntArray  # tickets of clips whose row group was read by now and whose batch is not complete yet

    @property
    def steps(self) -> range:
        return range(self.first, self.first + len(self.tickets))


class BucketBatchSampler:
    """The batches of a run. ``groups[i]``: the row group of clip i; ``shuffle``: batches in a window."""

    def __init__(
        self, buckets: Sequence[Bucket], groups: Sequence[int], *, batch: int, shuffle: int, seed: int
    ) -> None:
        self.buckets = list(buckets)
        self._groups, self._batch, self._seed = np.asarray(groups, np.int64), batch, seed
        self._group_sizes = np.bincount(self._groups[np.concatenate([b.clips for b in buckets])])
        self._sizes = np.array([len(b.clips) for b in buckets])
        self._windows = max(1, round(int(self._sizes.sum()) / (shuffle * batch)))
        self._walk = lru_cache(maxsize=4)(self._make_walk)
        self._queue = lru_cache(maxsize=4 * len(buckets))(self._make_queue)
        self._given = lru_cache(maxsize=4)(self._make_given)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def clip_index(self, ticket: IntArray) -> IntArray:
        """Clip numbers of tickets."""
        return ticket % len(self._groups)

    def row_group_index(self, ticket: IntArray) -> IntArray:
        """A number for the row group of each ticket in its epoch: tickets with the same one are read together."""
        epoch, clip = np.divmod(ticket, len(self._groups))
        return epoch * len(self._group_sizes) + self._groups[clip]

    def window(self, step: int) -> ShuffleWindow:
        """The window of a step."""
        epoch = step * self._batch // int(self._sizes.sum())  # or a little later: queues hold back clips
        while self._before(epoch + 1) <= step:
            epoch += 1
        number = int(np.searchsorted(self._firsts(epoch), step, side="right")) - 1
        return self._window(epoch, number)

    def chunks(self, step: int) -> int:
        """Whole chunks that every clip of a step's batch holds."""
        window = self.window(step)
        return int(window.chunks[step - window.first])

    def clip_at(self, step: int, row: int) -> int:
        """The clip in a row of a step's batch."""
        window = self.window(step)
        return int(self.clip_index(window.tickets[step - window.first, row]))

    def _make_window(self, epoch: int, number: int) -> ShuffleWindow:
        first = int(self._firsts(epoch)[number])
        parts = [self._block(b, epoch, number, first) for b in range(len(self.buckets))]
        bucket = np.repeat(np.arange(len(parts)), [len(batches) for batches, _ in parts])
        bucket = bucket[torch.randperm(len(bucket), generator=self._draw("window", first)).numpy()]
        tickets = np.empty((len(bucket), self._batch), np.int64)
        for b, (batches, _) in enumerate(parts):
            tickets[bucket == b] = batches  # in their order: a batch that completes an epoch comes before the next one
        return ShuffleWindow(
            first=first,
            tickets=tickets,
            chunks=np.array([b.chunks for b in self.buckets])[bucket],
            carried_over=np.concatenate([later for _, later in parts]),
        )

    def _firsts(self, epoch: int) -> IntArray:
        """First step of each window of an epoch, and of the next epoch."""
        return (self._given(epoch) // self._batch).sum(0)

    def _before(self, epoch: int) -> int:
        """Steps before an epoch."""
        return int((epoch * self._sizes // self._batch).sum())

    def _block(self, bucket: int, epoch: int, window: int, first: int) -> tuple[IntArray, IntArray]:
        """Tickets of a bucket: (q, B) of the batches that a window gives out, and those that wait for a later one."""
        begin, end = (int(n) for n in self._given(epoch)[bucket, window : window + 2])
        begin, whole = begin // self._batch * self._batch, end // self._batch * self._batch
        tickets = self._tickets(bucket, begin, end)
        batches = self._deal(tickets[: whole - begin], epoch, self._draw(f"rows/{bucket}", first))
        return batches, tickets[whole - begin :]

    def _deal(self, tickets: IntArray, epoch: int, draw: torch.Generator) -> IntArray:
        """(q, B) of q * B tickets: those of earlier epochs begin the first batch, the rest go as the top says."""
        old, new = tickets[tickets < epoch * len(self._groups)], tickets[tickets >= epoch * len(self._groups)]
        new = new[np.argsort(self._depth(new, epoch), kind="stable")]
        missing = -len(old) % self._batch
        evenly = np.arange(missing) * len(new) // max(1, missing)
        runs = np.delete(new, evenly).reshape(self._batch, -1)
        mixed = torch.rand(runs.shape, generator=draw).argsort(1).numpy()
        spanning = np.concatenate([old, new[evenly]]).reshape(-1, self._batch)
        return np.concatenate([spanning, np.take_along_axis(runs, mixed, 1).T])

    def _tickets(self, bucket: int, begin: int, end: int) -> IntArray:
        """Positions ``begin .. end - 1`` of a bucket's queue, which runs through all epochs."""
        size, out = int(self._sizes[bucket]), [np.empty(0, np.int64)]
        for epoch in range(begin // size, (end - 1) // size + 1):
            part = self._queue(bucket, epoch)[max(0, begin - epoch * size) : end - epoch * size]
            out.append(part + epoch * len(self._groups))
        return np.concatenate(out)

    def _depth(self, tickets: IntArray, epoch: int) -> FloatArray:
        """How far into its window each ticket's row group is read, 0 to 1."""
        return self._walk(epoch)[self._groups[self.clip_index(tickets)]] % 1

    def _make_queue(self, bucket: int, epoch: int) -> IntArray:
        """The clips of a bucket in the order of an epoch."""
        clips = self.buckets[bucket].clips
        within = torch.rand(len(clips), generator=self._draw(f"clips/{bucket}", epoch)).numpy()
        return clips[np.lexsort((within, self._walk(epoch)[self._groups[clips]]))]

    def _make_walk(self, epoch: int) -> FloatArray:
        """When every row group is read in an epoch, in windows since its start."""
        order = torch.randperm(len(self._group_sizes), generator=self._draw("groups", epoch)).numpy()
        sizes = self._group_sizes[order]
        when = np.empty(len(order))
        when[order] = (sizes.cumsum() - sizes) * self._windows / sizes.sum()
        return when

    def _make_given(self, epoch: int) -> IntArray:
        """(buckets, windows + 1): clips that entered each bucket's queue before each window, and by the epoch's end."""
        when = self._walk(epoch)
        rows = [
            np.searchsorted(when[self._groups[self._queue(b, epoch)]], np.arange(self._windows + 1))
            for b in range(len(self.buckets))
        ]
        return np.stack(rows) + epoch * self._sizes[:, None]

    def _draw(self, stream: str, index: int) -> torch.Generator:
        return generator(self._seed, f"order/{stream}", index)
