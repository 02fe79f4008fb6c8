"""The global batch: a pure function of (seed, samples seen). Ranks take contiguous shares of it.

Clips come in epochs, each a permutation drawn from (seed, epoch); sample number s is clip ``s % clips`` of permutation
``s // clips``, so batches run across epoch borders and nothing is skipped or repeated. A batch's number of chunks is
drawn from (seed, step) and shared by all ranks; everything else about a row is drawn from its sample number.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.rng import generator, uniform_rows
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream

HELD_OUT_FIRST = 1 << 40  # sample numbers of held-out clips: noise that training never draws
FILLER = -1  # sample number of a row that makes the shares of an evaluation equal and does not count


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches of a run, and what is dropped from their conditions."""

    batch: int  # clips per optimizer step, over all ranks
    micro: int | None = None  # clips per rank and backward pass; None: the rank's whole share at once
    chunks: tuple[int, int]  # fewest and most chunks of a training clip, drawn for every step
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
        if self.batch < 1 or self.prefetch < 1 or self.held_out_clips < 1 or (self.micro or 1) < 1:
            raise ValueError("data.batch, data.micro, data.held_out_clips and data.prefetch must be at least 1")
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
    """The clips of one split: ``lengths[i]`` whole chunks in clip i, ``read(i)`` its tensors."""

    lengths: Sequence[int]
    read: Callable[[int], Clip]


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

    def of(self, batch: int) -> slice:
        if batch % self.world:
            raise ValueError(
                f"a global batch of {batch} clips cannot be shared by {self.world} workers: "
                f"set data.batch to a multiple of {self.world}"
            )
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)


class TrainingBatches:
    """This rank's part of global batch number ``step``, in micro-batches."""

    def __init__(self, clips: Clips, assembly: Assembly, config: DataConfig, seed: int, share: Share) -> None:
        self._clips, self._assembly, self._config, self._seed = clips, assembly, config, seed
        self._usable = [i for i, length in enumerate(clips.lengths) if length >= config.chunks[0]]
        if not self._usable:
            raise ValueError(
                f"no training clip holds {config.chunks[0]} chunks (the longest of {len(clips.lengths)}: "
                f"{max(clips.lengths, default=0)}): preprocess longer clips or lower data.chunks"
            )
        self._share = share.of(config.batch)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def step(self, step: int) -> list[AVBatch]:
        """Pure: equal arguments and configuration give equal batches, whatever came before."""
        numbers = range(step * self._config.batch, (step + 1) * self._config.batch)
        clips = [self._clip(s) for s in numbers]
        chunks = min(self._chunks(step), *(self._clips.lengths[i] for i in clips))
        own = list(zip(clips, numbers, strict=True))[self._share]
        size = self._config.micro or len(own)
        return [self._assemble(own[i : i + size], chunks) for i in range(0, len(own), size)]

    def _chunks(self, step: int) -> int:
        low, high = self._config.chunks
        return int(torch.randint(low, high + 1, (1,), generator=generator(self._seed, "chunks", step)))

    def _clip(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self._usable))
        if self._epoch[0] != epoch:
            order = torch.randperm(len(self._usable), generator=generator(self._seed, "epoch", epoch))
            self._epoch = epoch, order.tolist()
        return self._usable[self._epoch[1][position]]

    def _assemble(self, rows: Sequence[tuple[int, int]], chunks: int) -> AVBatch:
        samples = torch.tensor([sample for _, sample in rows])
        batch = self._assembly.batch([self._clips.read(clip) for clip, _ in rows], chunks, samples, self._seed)
        return drop_conditions(batch, self._config, self._seed)


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
    """This rank's part of the fixed evaluation: the first held-out clips, whole conditions, always the same noise."""
    usable = [i for i, length in enumerate(clips.lengths) if length >= config.chunks[0]]
    if not usable:
        raise ValueError("no held-out clip is long enough to evaluate on: add clips, or raise data.held_out")
    chosen = usable[: config.held_out_clips]
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


T = TypeVar("T")


def prefetched(make: Callable[[int], T], first: int, last: int, ahead: int) -> Iterator[T]:
    """``make(first) .. make(last - 1)`` in order, made by a background thread at most ``ahead`` items early."""
    ready: queue.Queue[T | BaseException] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: T | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for i in range(first, last):
                if stop.is_set():
                    return
                put(make(i))
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in range(first, last):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
