"""The global batch: a pure function of (seed, samples seen). Each rank takes a contiguous shard of it.

``batch_sampler`` selects the clips of a batch, ``clip_loader`` reads them. The number of chunks of a batch is drawn
from (seed, step) and equal on all ranks. All other draws of a row use its sample number, ``step * batch + row``.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.rng import PADDING_SAMPLE, VALIDATION_SAMPLE_OFFSET, generator
from mfcore.types import AVBatch
from preprocessing.dataset.reader import ClipDataset
from workflows.config.run import DataConfig
from workflows.data.batch_sampler import BucketBatchSampler, make_buckets
from workflows.data.clip_loader import LoadFn, RowGroupLoader
from workflows.data.collate import (
    BatchCollator,
    LatentClip,
    apply_condition_dropout,
)


@dataclass(frozen=True, kw_only=True)
class ClipSplit:
    """Clips of one split: ``lengths[i]`` whole chunks in clip i, ``read(i)`` its tensors.

    ``groups[i]`` is the row group of clip i, ``shapes[i]`` its latent size. By default each clip is a row group and all
    have one size. ``load`` reads clips of one row group together.
    """

    lengths: Sequence[int]
    read: Callable[[int], LatentClip]
    groups: Sequence[int] | None = None
    shapes: Sequence[Hashable] | None = None
    load: LoadFn[LatentClip] | None = None
    ids: Sequence[str] | None = None  # for messages


@dataclass(frozen=True, kw_only=True)
class RankShard:
    """Part of every global batch that one rank computes."""

    rank: int
    world: int
    unit: int = 1  # rows that stay together on one rank and in one micro-batch

    def rows(self, batch: int) -> slice:
        """Return the rows of this rank; ranks differ by at most one unit. Raises ValueError for an empty shard."""
        units = batch // self.unit
        if batch % self.unit or units < self.world:
            raise UserInputError(
                f"cannot split a global batch of {batch} clips over {self.world} workers in units of {self.unit}: set "
                f"data.batch to a multiple of {self.unit} that is at least {self.world * self.unit}"
            )
        return slice(self.rank * units // self.world * self.unit, (self.rank + 1) * units // self.world * self.unit)

    def micro_batches(self, batch: int, micro: int | None) -> list[slice]:
        """Split the rows of this rank into runs of ``micro``, the last one shorter; every rank gets as many runs.

        If shards differ and ``micro`` is one unit, one run has a unit more.
        """
        rows = self.rows(batch)
        units = batch // self.unit
        own = (rows.stop - rows.start) // self.unit
        least = units // self.world
        most = -(-units // self.world)
        size = max(1, (micro or batch) // self.unit)
        count = min(-(-most // size), least)
        cuts = [min(i * size, own - count + i) for i in range(count)] + [own]
        return [
            slice(rows.start + a * self.unit, rows.start + b * self.unit) for a, b in zip(cuts, cuts[1:], strict=False)
        ]


class TrainingBatchLoader:
    """Loader of this rank's shard of every global batch, in micro-batches."""

    def __init__(
        self, clips: ClipSplit, collator: BatchCollator, config: DataConfig, *, seed: int, shard: RankShard
    ) -> None:
        self._clips = clips
        self._collator = collator
        self._config = config
        self._seed = seed
        self._shard = shard
        shapes = clips.shapes if clips.shapes is not None else [None] * len(clips.lengths)
        min_chunks, max_chunks = config.chunks
        buckets = make_buckets(clips.lengths, shapes, min_chunks=min_chunks, max_chunks=max_chunks, batch=config.batch)
        if not buckets:
            raise UserInputError(
                f"no training clip holds {config.chunks[0]} chunks (the longest of {len(clips.lengths)} has "
                f"{max(clips.lengths, default=0)}): preprocess longer clips or lower data.chunks"
            )
        groups = clips.groups if clips.groups is not None else range(len(clips.lengths))
        self._sampler = BucketBatchSampler(buckets, groups, batch=config.batch, shuffle=config.shuffle, seed=seed)
        self._clip_loader = RowGroupLoader(_load_fn(clips), self._sampler, shard.rows(config.batch))

    def micro_batches(self, step: int) -> list[AVBatch]:
        """Return the micro-batches of global batch ``step``, independent of earlier calls."""
        chunks = self._draw_chunks(step)
        own = self._shard.rows(self._config.batch)
        clips = self._clip_loader.load_step(step)
        return [
            self._collate(clips[part.start - own.start : part.stop - own.start], step, part, chunks)
            for part in self._shard.micro_batches(self._config.batch, self._config.micro)
        ]

    def clip_ids(self, samples: Tensor) -> list[str]:
        """Return the clip ids of training sample numbers of any rank."""
        numbers = [self._sampler.clip_at(*divmod(int(s), self._config.batch)) for s in samples]
        return [self._clips.ids[i] if self._clips.ids else self._clips.read(i).id for i in numbers]

    def _draw_chunks(self, step: int) -> int:
        low, _ = self._config.chunks
        most = self._sampler.chunks(step)
        return int(torch.randint(low, most + 1, (1,), generator=generator(self._seed, "chunks", step)))

    def _collate(self, clips: Sequence[LatentClip], step: int, rows: slice, chunks: int) -> AVBatch:
        samples = torch.arange(rows.start, rows.stop) + step * self._config.batch
        return apply_condition_dropout(
            self._collator.collate(clips, chunks, samples, self._seed), self._config, self._seed
        )


def _load_fn(clips: ClipSplit) -> LoadFn[LatentClip]:
    return clips.load or (lambda numbers: [partial(clips.read, i) for i in numbers])


def validation_batches(
    clips: ClipSplit, collator: BatchCollator, config: DataConfig, *, seed: int, shard: RankShard
) -> list[AVBatch]:
    """Return this rank's shard of the fixed evaluation: held-out clips with all conditions and constant noise.

    The end of each clip is its reference voice, unless clips have no more than the fewest chunks of training.
    """
    room = {length: collator.max_chunks_with_voice(length) for length in set(clips.lengths)}
    chosen = _select_validation_clips(clips, config, room)
    chunks = max(config.chunks[0], min(config.chunks[1], *(room[clips.lengths[i]] for i in chosen)))
    rows = [(clip, VALIDATION_SAMPLE_OFFSET + n) for n, clip in enumerate(chosen)]
    rows += [(chosen[0], PADDING_SAMPLE)] * (-len(rows) % shard.world)
    own = rows[shard.rows(len(rows))]
    size = config.micro or max(1, config.batch // shard.world)
    return [
        collator.collate(
            [clips.read(clip) for clip, _ in own[at : at + size]],
            chunks,
            torch.tensor([sample for _, sample in own[at : at + size]]),
            seed,
        )
        for at in range(0, len(own), size)
    ]


def _select_validation_clips(clips: ClipSplit, config: DataConfig, room: Mapping[int, int]) -> list[int]:
    """Return the clips with most room of the most frequent shape, so that one short clip does not shorten all.

    ``room``: chunks that leave audio for a reference voice, by clip length.
    """
    usable = [i for i, length in enumerate(clips.lengths) if length >= config.chunks[0]]
    if not usable:
        raise UserInputError(f"no held-out clip has {config.chunks[0]} chunks: add longer clips or raise data.held_out")
    if clips.shapes is not None:
        shapes = clips.shapes
        commonest, _ = Counter(shapes[i] for i in usable).most_common(1)[0]
        usable = [i for i in usable if shapes[i] == commonest]
    return sorted(usable, key=lambda i: -min(room[clips.lengths[i]], config.chunks[1]))[: config.held_out_clips]


def clip_split(dataset: ClipDataset) -> ClipSplit:
    """Return the clips of a dataset, read one row group at a time."""
    return ClipSplit(
        lengths=dataset.lengths,
        read=dataset.clip,
        groups=dataset.groups,
        shapes=dataset.shapes,
        load=dataset.load_clips,
        ids=dataset.ids,
    )
