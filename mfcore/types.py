"""Data types of ``mfcore``: streams of latents, conditions, batches, and the protocols of networks and KV caches.

Letters: B batch, K chunks, n latents of one modality, C latent channels, h w latent height and width, L text tokens,
D text width. Latents are ``(B, n, C)`` for audio and ``(B, n, C, h, w)`` for video.
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
    """Latents of one modality with their start times and chunk numbers."""

    latents: Float[Tensor, "B n C *space"]
    times: Float64[Tensor, " n"]  # seconds since the start of the clip
    chunk: Int64[Tensor, " n"]  # chunk number

    def with_latents(self, latents: Tensor) -> "Stream":
        """Return the stream with other latents."""
        return replace(self, latents=latents)

    def chunks(self, first: int, last: int) -> "Stream":
        """Return the latents of chunks ``first .. last - 1``."""
        keep = (self.chunk >= first) & (self.chunk < last)
        return Stream(latents=self.latents[:, keep], times=self.times[keep], chunk=self.chunk[keep])

    def rows(self, index: Tensor | slice) -> "Stream":
        """Select rows of the batch."""
        return self.with_latents(self.latents[row_indices(index, self.latents)])

    def to(self, device: torch.device | str) -> "Stream":
        """Move the latents. Times and chunk numbers stay on the CPU, where masks and rotations are computed."""
        return self.with_latents(self.latents.to(device))


Streams = Mapping[str, Stream]
"""Stream per modality. A uni-modal batch has one key."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Conditions of a batch of clips. Missing parts are zeros with a False mask, never None, so batches stack."""

    caption: Float[Tensor, "B L D"]
    caption_mask: Bool[Tensor, "B L"]  # True where a token is present
    words: Float[Tensor, "B W D"]  # transcript tokens
    words_mask: Bool[Tensor, "B W"]
    word_times: Float64[Tensor, "B W 2"]  # start and end, seconds since the start of the clip
    first_frame: Float[Tensor, "B C h w"] | None  # clean latent; None without a video branch
    voice: Float[Tensor, "B n C"] | None  # clean latents of a reference clip; None without an audio branch
    voice_mask: Bool[Tensor, " B"] | None  # True where a reference voice is given

    def rows(self, index: Tensor | slice) -> "Condition":
        """Select rows of the batch."""
        indices = row_indices(index, self.caption)
        return self._map_parts(lambda part: part[indices])

    def to(self, device: torch.device | str) -> "Condition":
        """Move all tensors."""
        return self._map_parts(lambda part: part.to(device))

    def _map_parts(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        parts: dict[str, Any] = {k: v if v is None else function(v) for k, v in vars(self).items()}
        return Condition(**parts)

    @staticmethod
    def stack(parts: Sequence["Condition"]) -> "Condition":
        """Concatenate the rows of all parts."""
        columns = {k: [vars(part)[k] for part in parts] for k in vars(parts[0])}
        joined: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
        return Condition(**joined)

    def drop(self, *, caption: Bool[Tensor, " B"], words: Bool[Tensor, " B"]) -> "Condition":
        """Remove caption or transcript in the rows where the flag is True (classifier-free guidance)."""
        return replace(
            self,
            caption_mask=self.caption_mask & ~caption[:, None],
            words_mask=self.words_mask & ~words[:, None],
        )

    def unconditional(self) -> "Condition":
        """Return the condition of the null branch: no caption, no transcript; first frame and voice stay."""
        return replace(
            self,
            caption_mask=torch.zeros_like(self.caption_mask),
            words_mask=torch.zeros_like(self.words_mask),
        )


@dataclass(frozen=True, kw_only=True)
class AVBatch:
    """Batch of clips, global or of one rank, with the sample numbers that seed its random draws."""

    streams: Streams
    cond: Condition
    samples: Int64[Tensor, " B"]  # position of each row in the sample sequence of the run; index of its generators

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return int(next(iter(self.streams.values())).chunk.max()) + 1

    def rows(self, index: Tensor | slice) -> "AVBatch":
        """Select rows of the batch."""
        return AVBatch(
            streams={m: s.rows(index) for m, s in self.streams.items()},
            cond=self.cond.rows(index),
            samples=self.samples[index],
        )

    def to(self, device: torch.device | str) -> "AVBatch":
        """Move latents and conditions. Sample numbers stay on the CPU: reading one from a GPU would synchronize."""
        return AVBatch(
            streams={m: s.to(device) for m, s in self.streams.items()}, cond=self.cond.to(device), samples=self.samples
        )


NoiseLevels = Mapping[str, Float[Tensor, "B K"]]
"""Noise level of every chunk, per modality."""


class KVCache(Protocol):
    """Keys and values of the sink (first frame, voice) and of the history of the clip."""

    def detach(self) -> "KVCache":
        """Return the cache without gradient."""
        ...

    def rows(self, index: Tensor) -> "KVCache":
        """Select rows of the batch."""
        ...

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of caches with the same chunks."""
        ...

    def evict_before(self, chunk: int) -> "KVCache":
        """Drop the chunks that ``chunk`` and later ones cannot see. Keeps streaming at constant cost."""
        ...

    def snapshot(self) -> "KVCache":
        """Return the content as a value that later passes do not change."""
        ...

    def shared_passes(self) -> "KVCache":
        """Return the cache for several passes over the same chunks, which may share what they have in common.

        No weight may change between these passes, and their gradients must be computed together.
        """
        ...


class VelocityModel(Protocol):
    """Interface of a network for objectives and rollout.

    ``model(x, t, r, cond, cache=cache)`` returns the average velocity of every chunk of ``x`` from t down to r. With
    r = t it is the instantaneous velocity. Each chunk attends to itself and to the cached chunks before it.

    With ``store`` the chunks of ``x`` are clean history of strength ``trust``. The returned cache contains them, and
    the velocities may be missing. Without a cache the sink is computed first; it depends on first frame and voice only.
    """

    def __call__(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        cond: Condition,
        *,
        cache: KVCache | None = None,
        store: bool = False,
        trust: Float[Tensor, " B"] | None = None,
    ) -> tuple[dict[str, Tensor], KVCache | None]:
        """Return the velocity of every chunk of ``x``, and the cache."""
        ...
