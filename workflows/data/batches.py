"""The global batch: a pure function of (seed, samples seen). Ranks take contiguous shares of it.

Which clips a batch holds is decided in ``order``, how a rank comes by them in ``supply``. A batch's number of chunks is
drawn from (seed, step) and shared by all ranks; everything else about a row is drawn from its sample number, which is
``step * batch + row``: numbers are dense, and no number of ranks enters.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mfcore.rng import generator
from mfcore.types import AVBatch
from preprocessing.dataset.reader import ClipDataset
from workflows.config.run import DataConfig
from workflows.data.batch_sampler import Order, make_buckets
from workflows.data.clip_loader import Load, Supply
from workflows.data.collate import FILLER, HELD_OUT_FIRST, Assembly, Clip, drop_conditions


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips of one split: ``lengths[i]`` whole chunks in clip i, ``read(i)`` its tensors.

    ``groups[i]`` and ``shapes[i]``: its row group, and the size of its latents (by default one clip is read at a time,
    and all have one size). ``load``: how clips of one row group are read at once.
    """

    lengths: Sequence[int]
    read: Callable[[int], Clip]
    groups: Sequence[int] | None = None
    shapes: Sequence[Hashable] | None = None
    load: Load[Clip] | None = None
    ids: Sequence[str] | None = None  # for messages


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch a process takes."""

    rank: int
    world: int
    unit: int = 1  # rows that stay together on one process and in one micro-batch

    def of(self, batch: int) -> slice:
        """Its rows: as many as any other process has, or a unit more or less. ValueError when some would have none."""
        units = batch // self.unit
        if batch % self.unit or units < self.world:
            raise ValueError(
                f"a global batch of {batch} clips gives {self.world} workers no share of whole {self.unit} each: set "
                f"data.batch to a multiple of {self.unit} that is at least {self.world * self.unit}"
            )
        return slice(self.rank * units // self.world * self.unit, (self.rank + 1) * units // self.world * self.unit)

    def micro_batches(self, batch: int, micro: int | None) -> list[slice]:
        """The same rows in runs of ``micro``, the last one shorter. Every process gets as many runs.

        (For that, one run has a unit more than ``micro`` where ``micro`` is one unit and the shares differ.)
        """
        rows, units = self.of(batch), batch // self.unit
        own, least, most = (rows.stop - rows.start) // self.unit, units // self.world, -(-units // self.world)
        size = max(1, (micro or batch) // self.unit)
        count = min(-(-most // size), least)
        cuts = [min(i * size, own - count + i) for i in range(count)] + [own]
        return [
            slice(rows.start + a * self.unit, rows.start + b * self.unit) for a, b in zip(cuts, cuts[1:], strict=False)
        ]


class TrainingBatches:
    """This rank's part of global batch number ``step``, in micro-batches."""

    def __init__(self, clips: Clips, assembly: Assembly, config: DataConfig, seed: int, share: Share) -> None:
        self._clips, self._assembly, self._config, self._seed, self._share = clips, assembly, config, seed, share
        shapes = clips.shapes if clips.shapes is not None else [None] * len(clips.lengths)
        buckets = make_buckets(clips.lengths, shapes, *config.chunks, config.batch)
        if not buckets:
            raise ValueError(
                f"no training clip holds {config.chunks[0]} chunks (the longest of {len(clips.lengths)}: "
                f"{max(clips.lengths, default=0)}): preprocess longer clips or lower data.chunks"
            )
        groups = clips.groups if clips.groups is not None else range(len(clips.lengths))
        self._order = Order(buckets, groups, batch=config.batch, shuffle=config.shuffle, seed=seed)
        self._supply = Supply(_loader(clips), self._order, share.of(config.batch))

    def step(self, step: int) -> list[AVBatch]:
        """Pure: equal arguments and configuration give equal batches, whatever came before."""
        chunks, own = self._chunks(step), self._share.of(self._config.batch)
        clips = self._supply.take(step)
        return [
            self._assemble(clips[part.start - own.start : part.stop - own.start], step, part, chunks)
            for part in self._share.micro_batches(self._config.batch, self._config.micro)
        ]

    def clip_ids(self, samples: Tensor) -> list[str]:
        """The clips behind sample numbers of training, on any rank."""
        numbers = [self._order.clip_of(*divmod(int(s), self._config.batch)) for s in samples]
        return [self._clips.ids[i] if self._clips.ids else self._clips.read(i).id for i in numbers]

    def _chunks(self, step: int) -> int:
        low, _ = self._config.chunks
        most = self._order.chunks(step)
        return int(torch.randint(low, most + 1, (1,), generator=generator(self._seed, "chunks", step)))

    def _assemble(self, clips: Sequence[Clip], step: int, rows: slice, chunks: int) -> AVBatch:
        samples = torch.arange(rows.start, rows.stop) + step * self._config.batch
        return drop_conditions(self._assembly.batch(clips, chunks, samples, self._seed), self._config, self._seed)


def _loader(clips: Clips) -> Load[Clip]:
    return clips.load or (lambda numbers: [partial(clips.read, i) for i in numbers])


def held_out_batches(clips: Clips, assembly: Assembly, config: DataConfig, seed: int, share: Share) -> list[AVBatch]:
    """This rank's part of the fixed evaluation: the same held-out clips, whole conditions, always the same noise."""
    chosen = _held_out_clips(clips, config)
    chunks = min(config.chunks[1], *(clips.lengths[i] for i in chosen))
    rows = [(clip, HELD_OUT_FIRST + n) for n, clip in enumerate(chosen)]
    rows += [(chosen[0], FILLER)] * (-len(rows) % share.world)
    own = rows[share.of(len(rows))]
    size = config.micro or max(1, config.batch // share.world)
    return [
        assembly.batch(
            [clips.read(clip) for clip, _ in own[at : at + size]],
            chunks,
            torch.tensor([sample for _, sample in own[at : at + size]]),
            seed,
        )
        for at in range(0, len(own), size)
    ]


def _held_out_clips(clips: Clips, config: DataConfig) -> list[int]:
    """The longest ones of the commonest shape, so that one short clip does not shorten all."""
    usable = [i for i, length in enumerate(clips.lengths) if length >= config.chunks[0]]
    if not usable:
        raise ValueError("no held-out clip is long enough to evaluate on: add clips, or raise data.held_out")
    if clips.shapes is not None:
        shapes = clips.shapes
        commonest, _ = Counter(shapes[i] for i in usable).most_common(1)[0]
        usable = [i for i in usable if shapes[i] == commonest]
    return sorted(usable, key=lambda i: -min(clips.lengths[i], config.chunks[1]))[: config.held_out_clips]


def clips_of(dataset: ClipDataset) -> Clips:
    """The clips of a dataset, to be read a row group at a time."""
    return Clips(
        lengths=dataset.lengths,
        read=dataset.clip,
        groups=dataset.groups,
        shapes=dataset.shapes,
        load=dataset.load,
        ids=dataset.ids,
    )
