"""The few values that travel between the parts of ``mfcore``.

Letters: B batch, K chunks, n latents of one modality, C latent channels, h w latent height and width, L text tokens,
D text width. Audio is a stream whose latents have no height and width: ``(B, n, C)``; video is ``(B, n, C, h, w)``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from mfcore.device import row_indices

VIDEO = "video"
AUDIO = "audio"
MODALITIES = (VIDEO, AUDIO)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Latents of one modality with the seconds at which they start and the chunk that holds them."""

    latents: Float[Tensor, "B n C *space"]
    times: Float64[Tensor, " n"]  # seconds since the start of the clip
    chunk: Int64[Tensor, " n"]  # chunk number

    def with_latents(self, latents: Tensor) -> "Stream":
        return replace(self, latents=latents)

    def chunks(self, first: int, last: int) -> "Stream":
        """The latents of chunks ``first .. last - 1``."""
        keep = (self.chunk >= first) & (self.chunk < last)
        return Stream(latents=self.latents[:, keep], times=self.times[keep], chunk=self.chunk[keep])

    def rows(self, index: Tensor | slice) -> "Stream":
        return self.with_latents(self.latents[row_indices(index, self.latents)])

    def to(self, device: torch.device | str) -> "Stream":
        """Move the latents; times and chunk numbers stay on the CPU, where masks and angles are made."""
        return self.with_latents(self.latents.to(device))


Streams = Mapping[str, Stream]
"""Modality -> Stream. A uni-modal batch is a mapping with one key."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Everything a clip is generated from. Absent parts are zero with a False mask, never None, so batches stack."""

    caption: Float[Tensor, "B L D"]
    caption_mask: Bool[Tensor, "B L"]  # True where a token is present
    words: Float[Tensor, "B W D"]  # transcript tokens
    words_mask: Bool[Tensor, "B W"]
    word_times: Float64[Tensor, "B W 2"]  # start and end, seconds since the start of the clip
    first_frame: Float[Tensor, "B C h w"] | None  # clean latent; None without a video branch
    voice: Float[Tensor, "B n C"] | None  # clean latents of a reference clip; None without an audio branch
    voice_mask: Bool[Tensor, " B"] | None  # True where a reference voice is given

    def rows(self, index: Tensor | slice) -> "Condition":
        there = row_indices(index, self.caption)
        return self._each(lambda part: part[there])

    def to(self, device: torch.device | str) -> "Condition":
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        parts: dict[str, Any] = {k: v if v is None else change(v) for k, v in vars(self).items()}
        return Condition(**parts)

    @staticmethod
    def stack(parts: Sequence["Condition"]) -> "Condition":
        """The rows of all parts, one after the other."""
        columns = {k: [vars(part)[k] for part in parts] for k in vars(parts[0])}
        whole: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
        return Condition(**whole)

    def drop(self, *, caption: Bool[Tensor, " B"], words: Bool[Tensor, " B"]) -> "Condition":
        """Remove caption or transcript in the rows where the flag is True (classifier-free guidance)."""
        return replace(
            self,
            caption_mask=self.caption_mask & ~caption[:, None],
            words_mask=self.words_mask & ~words[:, None],
        )

    def unconditional(self) -> "Condition":
        """The unconditional branch of guidance: no caption, no transcript; first frame and voice stay."""
        return replace(
            self,
            caption_mask=torch.zeros_like(self.caption_mask),
            words_mask=torch.zeros_like(self.words_mask),
        )


@dataclass(frozen=True, kw_only=True)
class AVBatch:
    """One global or local batch of clips, normalised, with the sample numbers that seed its random draws."""

    streams: Streams
    cond: Condition
    samples: Int64[Tensor, " B"]  # position of each row in the run's sample sequence: the index of every generator

    @property
    def chunks(self) -> int:
        return int(next(iter(self.streams.values())).chunk.max()) + 1

    def rows(self, index: Tensor | slice) -> "AVBatch":
        return AVBatch(
            streams={m: s.rows(index) for m, s in self.streams.items()},
            cond=self.cond.rows(index),
            samples=self.samples[index],
        )

    def to(self, device: torch.device | str) -> "AVBatch":
        """Move latents and conditions; sample numbers stay on the CPU, which would wait for each of them."""
        return AVBatch(
            streams={m: s.to(device) for m, s in self.streams.items()}, cond=self.cond.to(device), samples=self.samples
        )


NoiseLevels = Mapping[str, Float[Tensor, "B K"]]
"""Modality -> noise level of every chunk."""


class KVCache(Protocol):
    """Keys and values of what came before: the sink (first frame, voice), and the history of the clip."""

    def detach(self) -> "KVCache":
        """The same memory as data: no gradient reaches what wrote it."""
        ...

    def rows(self, index: Tensor) -> "KVCache":
        """The memory of some rows of the batch."""
        ...

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one after the other; all remember the same chunks."""
        ...

    def evict_before(self, chunk: int) -> "KVCache":
        """Forget what ``chunk`` and later ones can no longer see: keeps streaming at constant cost."""
        ...

    def snapshot(self) -> "KVCache":
        """What is remembered, as a value that later passes do not change."""
        ...

    def shared_passes(self) -> "KVCache":
        """Return the cache for several passes over the same chunks, which may share what they have in common.

        No weight may change between these passes, and their gradients must be computed together.
        """
        ...


class VelocityModel(Protocol):
    """What objectives and the rollout know of a network.

    ``model(x, t, r, cond, memory)`` gives the average velocity of every chunk of ``x`` from t down to r (r = t: the
    instantaneous velocity), each chunk seeing the memory before it and itself. With ``store`` the chunks of ``x`` are
    taken as clean history of strength ``trust``, and a memory that holds them too is returned; velocities then need
    not be. Without a memory the sink is written first, which depends on first frame and voice alone.
    """

    def __call__(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        cond: Condition,
        memory: KVCache | None = None,
        *,
        store: bool = False,
        trust: Float[Tensor, " B"] | None = None,
    ) -> tuple[dict[str, Tensor], KVCache | None]: ...
