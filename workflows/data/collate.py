"""Collate clips into an AVBatch: whitened latents, padded conditions, condition dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.errors import UserInputError
from mfcore.rng import uniform_rows
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream
from workflows.config.run import DataConfig


class LatentClip(Protocol):
    """Raw latents and text embeddings of one clip, as ``preprocessing.dataset.reader`` returns them."""

    @property
    def id(self) -> str:
        """Clip id in the dataset."""
        ...

    @property
    def video(self) -> Float[Tensor, "m C h w"] | None:
        """Video latents, m = head + n."""
        ...

    @property
    def audio(self) -> Float[Tensor, "n C"] | None:
        """Audio latents."""
        ...

    @property
    def caption_embedding(self) -> Float[Tensor, "L D"]:
        """Text features of the caption."""
        ...

    @property
    def words(self) -> Float[Tensor, "W D"]:
        """Text features of the transcript, one row per word."""
        ...

    @property
    def word_times(self) -> Tensor:
        """Start and end of every word, (W, 2), seconds since the start of the clip."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchCollator:
    """Collator for the modalities of a network: their clocks, and the statistics for whitening."""

    timeline: Timeline
    stats: Mapping[str, LatentStats]

    def collate(
        self, clips: Sequence[LatentClip], chunks: int, samples: Tensor, seed: int, *, target_chunks: int | None = None
    ) -> AVBatch:
        """Return the first ``chunks`` chunks of every clip; (seed, sample number) selects the reference voice.

        The voice comes from after the first ``target_chunks`` chunks (default: ``chunks``), which a network is to
        produce. Rows without enough audio there have no voice.
        """
        streams = {m: self._stream(m, clips, chunks) for m in self.timeline.clocks}
        captions, caption_mask = pad_rows([clip.caption_embedding for clip in clips])
        words, words_mask = pad_rows([clip.words for clip in clips])
        voice, voice_mask = None, None
        if AUDIO in streams:
            voice, voice_mask = self._voices(clips, target_chunks or chunks, samples, seed)
        cond = Condition(
            caption=captions,
            caption_mask=caption_mask,
            words=words,
            words_mask=words_mask,
            word_times=pad_rows([clip.word_times.double() for clip in clips])[0],
            first_frame=self._first_frames(clips) if VIDEO in streams else None,
            voice=voice,
            voice_mask=voice_mask,
        )
        return AVBatch(streams=streams, cond=cond, samples=samples)

    def _stream(self, modality: str, clips: Sequence[LatentClip], chunks: int) -> Stream:
        head = self.timeline.clocks[modality].head
        n = self.timeline.count(modality, chunks)
        latents = torch.stack([_latents(clip, modality)[head : head + n] for clip in clips])
        return Stream(
            latents=self.stats[modality].whiten(latents.float(), space=latents.ndim - 3),
            times=self.timeline.times(modality, chunks),
            chunk=self.timeline.chunk_index(modality, chunks),
        )

    def _first_frames(self, clips: Sequence[LatentClip]) -> Tensor:
        first = torch.stack([_latents(clip, VIDEO)[0] for clip in clips])
        return self.stats[VIDEO].whiten(first.float(), head=True, space=first.ndim - 2)

    def max_chunks_with_voice(self, chunks: int) -> int:
        """Return how many of ``chunks`` chunks leave audio for a reference voice; all of them without audio."""
        if AUDIO not in self.timeline.clocks:
            return chunks
        most = self.timeline.count(AUDIO, chunks) - self.timeline.count(AUDIO, 1)
        return max((k for k in range(1, chunks) if self.timeline.count(AUDIO, k) <= most), default=0)

    def _voices(self, clips: Sequence[LatentClip], target: int, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return one chunk of audio per clip from after the ``target`` chunks, and True where the clip has one."""
        n, first = self.timeline.count(AUDIO, 1), self.timeline.count(AUDIO, target)
        draws = uniform_rows(seed, "voice", samples, 1)[:, 0].tolist()
        voices: list[Tensor] = []
        for clip, draw in zip(clips, draws, strict=True):
            sound = _latents(clip, AUDIO)
            start = first + int(draw * (len(sound) - n - first + 1))
            voices.append(sound[start : start + n] if len(sound) - n >= first else sound.new_zeros(0, *sound.shape[1:]))
        mask = torch.tensor([len(voice) > 0 for voice in voices])
        whitened = [self.stats[AUDIO].whiten(voice.float()) for voice in voices]
        return pad_rows(whitened, width=n)[0], mask


def _latents(clip: LatentClip, modality: str) -> Tensor:
    latents = clip.video if modality == VIDEO else clip.audio
    if latents is None:
        raise UserInputError(f"clip {clip.id} has no {modality} latents: a {modality} branch needs another dataset")
    return latents


def pad_rows(rows: Sequence[Tensor], width: int = 1) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths, zero-padded to at least ``width``; return them and their mask."""
    width = max(width, *(len(row) for row in rows))
    out = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        mask[i, : len(row)] = True
    return out, mask


def apply_condition_dropout(batch: AVBatch, config: DataConfig, seed: int) -> AVBatch:
    """Drop caption, transcript or both (classifier-free guidance) and the voice, by sample number."""
    draw, voice = uniform_rows(seed, "drop", batch.samples, 2).unbind(-1)
    both = draw < config.drop_both
    caption = (draw >= config.drop_both) & (draw < config.drop_both + config.drop_caption)
    words = (draw >= 1 - config.drop_words) & ~both & ~caption
    cond = batch.cond.drop(caption=both | caption, words=both | words)
    if cond.voice_mask is not None:
        cond = Condition(**(vars(cond) | {"voice_mask": cond.voice_mask & (voice >= config.drop_voice)}))
    return AVBatch(streams=batch.streams, cond=cond, samples=batch.samples)
