"""Frames and sound -> raw latents, words -> embeddings; and the per-channel sums from which statistics come."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfcore.codecs.base import Codec
from mfcore.codecs.stats import LatentStats
from mfcore.codecs.words import HashedWords
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from preprocessing.record import Clip

# A channel that never varies (the colour of a grey corpus) has no scale of its own: it gets this share of the largest.
_LEAST_STD = 1e-3


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What one worker keeps loaded: the codec of each modality present, and the text encoder."""

    codecs: Mapping[str, Codec]
    words: HashedWords
    timeline: Timeline


def encode(clip: Clip, encoders: Encoders) -> Clip:
    """The clip with the latents of its whole chunks (after each codec's head) and the embeddings of its text."""
    signals: dict[str, Any] = {VIDEO: clip.frames, AUDIO: clip.waveform}
    latents = {m: codec.encode(torch.from_numpy(signals[m])) for m, codec in encoders.codecs.items()}
    heads = {m: encoders.timeline.clocks[m].head for m in latents}
    chunks = encoders.timeline.whole_chunks({m: len(x) - heads[m] for m, x in latents.items()})
    kept = {m: x[: heads[m] + encoders.timeline.count(m, chunks)] for m, x in latents.items()}
    return replace(
        clip,
        latents=kept,
        caption_embedding=encoders.words.encode_caption(clip.caption),
        words_embedding=encoders.words.encode([w.word for w in clip.transcript]),
    )


def latent_times(latents: Mapping[str, Tensor], timeline: Timeline) -> dict[str, list[float]]:
    """Seconds since the start of the clip at which each latent starts; the first-frame latent is at 0."""
    times = {}
    for modality, x in latents.items():
        clock = timeline.clocks[modality]
        times[modality] = [0.0] * clock.head + [float(clock.start(i)) for i in range(len(x) - clock.head)]
    return times


@dataclass
class ChannelSums:
    """Count, sum and sum of squares of one modality's latents per channel, head and rest apart (float64)."""

    head: Tensor  # (3, C)
    rest: Tensor  # (3, C)

    @classmethod
    def zero(cls, channels: int) -> "ChannelSums":
        return cls(*(torch.zeros(3, channels, dtype=torch.float64) for _ in range(2)))

    def add(self, latents: Tensor, head: int) -> None:
        """Count one clip's latents ``(n, C, *space)``, the first ``head`` of them apart."""
        self.head += _sums(latents[:head])
        self.rest += _sums(latents[head:])

    def __add__(self, other: "ChannelSums") -> "ChannelSums":
        return ChannelSums(self.head + other.head, self.rest + other.rest)

    def to_json(self) -> dict[str, Any]:
        return {"head": self.head.tolist(), "rest": self.rest.tolist()}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "ChannelSums":
        return cls(*(torch.tensor(facts[part], dtype=torch.float64) for part in ("head", "rest")))

    def stats(self) -> LatentStats | None:
        """Mean and standard deviation per channel; None where nothing was counted."""
        if self.rest[0, 0] == 0:
            return None
        mean, std = _moments(self.rest)
        head_mean, head_std = _moments(self.head) if self.head[0, 0] > 0 else ((), ())
        return LatentStats(mean=mean, std=std, head_mean=head_mean, head_std=head_std)


def _sums(latents: Tensor) -> Tensor:
    """(3, C): count, sum and sum of squares over everything but the channel axis 1."""
    flat = latents.double().transpose(0, 1).flatten(1)
    count = torch.full((flat.shape[0],), float(flat.shape[1]), dtype=torch.float64)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def _moments(sums: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count, total, squares = sums
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    least = max(float(std.max()) * _LEAST_STD, 1e-6)
    return tuple(mean.tolist()), tuple(std.clamp(min=least).tolist())


def merge_sums(merged: dict[str, ChannelSums], part: Mapping[str, Any]) -> None:
    """Add a unit's sums, as its marker has them, to those of the units before it."""
    for modality, facts in part.items():
        sums = ChannelSums.from_json(facts)
        merged[modality] = merged[modality] + sums if modality in merged else sums
