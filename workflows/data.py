"""The global batch: a pure function of (seed, samples seen). Ranks take contiguous shares of it.

Which clips a batch holds is decided in ``order``, how a rank comes by them in ``supply``. A batch's number of chunks is
drawn from (seed, step) and shared by all ranks; everything else about a row is drawn from its sample number, which is
``step * batch + row``: numbers are dense, and no number of ranks enters.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.rng import generator, uniform_rows
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream
from workflows.training.order import Order, make_buckets
from workflows.training.supply import Load, Supply

HELD_OUT_FIRST = 1 << 40  # sample numbers of held-out clips: noise that training never draws
FILLER = -1  # sample number of a row that makes the shares of an evaluation equal and does not count


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches of a run, and what is dropped from their conditions."""

    batch: int  # clips per optimizer step, over all ranks
    micro: int | None = None  # clips per rank and backward pass; None: the rank's whole share at once
    chunks: tuple[int, int]  # fewest and most chunks of a training clip, drawn for every step
    shuffle: int = 32  # batches whose clips are mixed with each other; a rank holds its part of so many in memory
    held_out: float = 0.1  # share of the sources kept for evaluation
    held_out_clips: int = 16  # clips of an evaluation
    drop_both: float = 0.1  # chance that caption and transcript are both hidden (guidance)
    drop_caption: float = 0.05  # chance that the caption alone is hidden
    drop_words: float = 0.05  # chance that the transcript alone is hidden
    drop_voice: float = 0.5  # chance that no reference voice is given
    prefetch: int = 2  # batches prepared ahead
    whitening: Mapping[str, float] = field(default_factory=dict[str, float])  # power of a channel's spread that is
    # divided out, per modality; 1 (each channel has spread 1) where none is given. Later stages inherit it.

    def __post_init__(self) -> None:
        counts = (self.batch, self.micro or 1, self.shuffle, self.held_out_clips, self.prefetch)
        if min(counts) < 1 or self.micro == 0:
            raise ValueError(
                "data.batch, data.micro, data.shuffle, data.held_out_clips and data.prefetch must be at least 1, got "
                f"{self.batch}, {self.micro}, {self.shuffle}, {self.held_out_clips} and {self.prefetch}"
            )
        if not 1 <= self.chunks[0] <= self.chunks[1]:
            raise ValueError(f"data.chunks must be (fewest, most) with 1 <= fewest <= most, got {self.chunks}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.held_out}")
        chances = (self.drop_both, self.drop_caption, self.drop_words, self.drop_voice)
        if min(chances) < 0 or max(chances) > 1 or sum(chances[:3]) > 1:
            raise ValueError(
                "the data.drop_* chances must be in [0, 1], those of caption and transcript 1 at most in sum"
            )


class Clip(Protocol):
    """Raw latents and text of one clip, as ``preprocessing.reader`` gives them."""

    @property
    def id(self) -> str: ...
    @property
    def video(self) -> Float[Tensor, "m C h w"] | None: ...  # m = head + n
    @property
    def audio(self) -> Float[Tensor, "n C"] | None: ...
    @property
    def caption_embedding(self) -> Float[Tensor, "L D"]: ...
    @property
    def words(self) -> Float[Tensor, "W D"]: ...
    @property
    def word_times(self) -> Tensor: ...  # (W, 2), seconds since the start of the clip


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
class Assembly:
    """How clips become a batch: clocks of the modalities that the network has, statistics to whiten with."""

    timeline: Timeline
    stats: Mapping[str, LatentStats]

    def batch(self, clips: Sequence[Clip], chunks: int, samples: Tensor, seed: int) -> AVBatch:
        """The first ``chunks`` chunks of every clip; the reference voice is drawn from (seed, sample number)."""
        streams = {m: self._stream(m, clips, chunks) for m in self.timeline.clocks}
        captions, caption_mask = pad([clip.caption_embedding for clip in clips])
        words, words_mask = pad([clip.words for clip in clips])
        voice = self._voices(clips, chunks, samples, seed) if AUDIO in streams else None
        cond = Condition(
            caption=captions,
            caption_mask=caption_mask,
            words=words,
            words_mask=words_mask,
            word_times=pad([clip.word_times.double() for clip in clips])[0],
            first_frame=self._first_frames(clips) if VIDEO in streams else None,
            voice=voice,
            voice_mask=None if voice is None else torch.ones(len(clips), dtype=torch.bool),
        )
        return AVBatch(streams=streams, cond=cond, samples=samples)

    def _stream(self, modality: str, clips: Sequence[Clip], chunks: int) -> Stream:
        head = self.timeline.clocks[modality].head
        n = self.timeline.count(modality, chunks)
        latents = torch.stack([_latents(clip, modality)[head : head + n] for clip in clips])
        return Stream(
            latents=self.stats[modality].whiten(latents.float(), space=latents.ndim - 3),
            times=self.timeline.times(modality, chunks),
            chunk=self.timeline.chunk_index(modality, chunks),
        )

    def _first_frames(self, clips: Sequence[Clip]) -> Tensor:
        first = torch.stack([_latents(clip, VIDEO)[0] for clip in clips])
        return self.stats[VIDEO].whiten(first.float(), head=True, space=first.ndim - 2)

    def _voices(self, clips: Sequence[Clip], chunks: int, samples: Tensor, seed: int) -> Tensor:
        """One chunk's worth of sound from each clip: from after the trained chunks where the clip is long enough."""
        n, trained = self.timeline.count(AUDIO, 1), self.timeline.count(AUDIO, chunks)
        draws = uniform_rows(seed, "voice", samples, 1)[:, 0].tolist()
        voices: list[Tensor] = []
        for clip, draw in zip(clips, draws, strict=True):
            sound = _latents(clip, AUDIO)
            first = trained if len(sound) - trained >= n else 0
            start = first + int(draw * (len(sound) - n - first + 1))
            voices.append(sound[start : start + n])
        return self.stats[AUDIO].whiten(torch.stack(voices).float())


def _latents(clip: Clip, modality: str) -> Tensor:
    latents = clip.video if modality == VIDEO else clip.audio
    if latents is None:
        raise ValueError(f"clip {clip.id} has no {modality} latents: this dataset cannot train a {modality} branch")
    return latents


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor with zeros behind, and where they are present. Width at least one."""
    width = max(1, *(len(row) for row in rows))
    out = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        mask[i, : len(row)] = True
    return out, mask


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


def drop_conditions(batch: AVBatch, config: DataConfig, seed: int) -> AVBatch:
    """Hide caption, transcript or both (classifier-free guidance, METHOD 4) and the voice, by sample number."""
    draw, voice = uniform_rows(seed, "drop", batch.samples, 2).unbind(-1)
    both = draw < config.drop_both
    caption = (draw >= config.drop_both) & (draw < config.drop_both + config.drop_caption)
    words = (draw >= 1 - config.drop_words) & ~both & ~caption
    cond = batch.cond.drop(caption=both | caption, words=both | words)
    if cond.voice_mask is not None:
        cond = Condition(**(vars(cond) | {"voice_mask": cond.voice_mask & (voice >= config.drop_voice)}))
    return AVBatch(streams=batch.streams, cond=cond, samples=batch.samples)


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
