"""Encode frames and audio to raw latents and words to embeddings; accumulate statistics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfcore.codecs.base import Codec, TextCodec
from mfcore.codecs.stats import LatentStats
from mfcore.errors import check_range
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from preprocessing.records import Clip, Rejected

# A constant channel, such as the color of a gray corpus, gets this share of the largest standard deviation.
_MIN_STD = 1e-3


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Encoders of one worker: the codec of each modality and the text encoder."""

    codecs: Mapping[str, Codec]
    words: TextCodec
    timeline: Timeline

    def load(self) -> None:
        """Load all weights, so that missing ones end the run before its first clip."""
        for codec in (*self.codecs.values(), self.words):
            codec.load()


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Batching and devices of pretrained codecs; embedded ones encode single clips."""

    batch: int = 4  # clips of one shape encoded together
    gpus: float = 0.0  # share of a GPU per encoder, e.g. 0.25; 0: CPU, float32
    ahead_bytes: int = 1 << 30  # decoded clips that wait for encoding, per worker

    def __post_init__(self) -> None:
        check_range("encoder.batch", self.batch, 1, 10**4)
        check_range("encoder.gpus", self.gpus, 0, 1)
        check_range("encoder.ahead_bytes", self.ahead_bytes, 1, 2**50)


def encode_clip(clip: Clip, encoders: Encoders) -> Clip:
    """Return the clip with the latents of its whole chunks and the embeddings of its text."""
    signals: dict[str, Any] = {VIDEO: clip.frames, AUDIO: clip.waveform}
    latents = {
        m: codec.encode(torch.from_numpy(np.require(signals[m], requirements="W")))  # arrays of Ray are read-only
        for m, codec in encoders.codecs.items()
    }
    return _encoded(clip, latents, encoders)


def encode_batch(
    clips: Sequence[Clip], encoders: Encoders, encode_one: Callable[[Clip], Clip | Rejected]
) -> Sequence[Clip | Rejected]:
    """Encode clips of one shape as a batch; if it fails, encode them with `encode_one` to find the failing clip.

    Raise RuntimeError if the batch does not fit on the GPU.
    """
    try:
        latents = {m: codec.encode_batch(_signals(clips, m)) for m, codec in encoders.codecs.items()}
        return [_encoded(clip, {m: x[i] for m, x in latents.items()}, encoders) for i, clip in enumerate(clips)]
    except torch.OutOfMemoryError as error:  # caused by the machine, not by a clip
        raise RuntimeError(
            f"{len(clips)} clips do not fit on the GPU. Lower encoder.batch, or raise encoder.gpus so that fewer "
            "workers share it"
        ) from error
    except Exception:  # encoding clips separately attributes the error to one of them
        return [encode_one(clip) for clip in clips]


def _signals(clips: Sequence[Clip], modality: str) -> Tensor:
    arrays: list[Any] = [clip.frames if modality == VIDEO else clip.waveform for clip in clips]
    return torch.from_numpy(np.stack(arrays))


def _encoded(clip: Clip, latents: Mapping[str, Tensor], encoders: Encoders) -> Clip:
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
    """Return the start of each latent in seconds since the start of the clip; 0 for the head."""
    times = {}
    for modality, x in latents.items():
        clock = timeline.clocks[modality]
        times[modality] = [0.0] * clock.head + [float(clock.start(i)) for i in range(len(x) - clock.head)]
    return times


@dataclass
class RunningMoments:
    """Count, sum and sum of squares per channel of one modality, for head and rest."""

    head: Tensor  # (3, C)
    rest: Tensor  # (3, C)

    @classmethod
    def zeros(cls, channels: int) -> "RunningMoments":
        """Return empty sums."""
        return cls(*(torch.zeros(3, channels, dtype=torch.float64) for _ in range(2)))

    def add(self, latents: Tensor, head: int) -> None:
        """Add the latents ``(n, C, *space)`` of a clip, the first `head` of them to the head."""
        self.head += _sums(latents[:head])
        self.rest += _sums(latents[head:])

    def __add__(self, other: "RunningMoments") -> "RunningMoments":
        return RunningMoments(self.head + other.head, self.rest + other.rest)

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON values."""
        return {"head": self.head.tolist(), "rest": self.rest.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunningMoments":
        """Return the sums that `to_json` wrote."""
        return cls(*(torch.tensor(values[part], dtype=torch.float64) for part in ("head", "rest")))

    def stats(self) -> LatentStats | None:
        """Return mean and standard deviation per channel; None without latents."""
        if self.rest[0, 0] == 0:
            return None
        mean, std = _moments(self.rest)
        head_mean, head_std = _moments(self.head) if self.head[0, 0] > 0 else ((), ())
        return LatentStats(mean=mean, std=std, head_mean=head_mean, head_std=head_std)


def _sums(latents: Tensor) -> Tensor:
    """Return count, sum and sum of squares ``(3, C)`` over all axes but the channel axis 1."""
    flat = latents.double().transpose(0, 1).flatten(1)
    count = torch.full((flat.shape[0],), float(flat.shape[1]), dtype=torch.float64)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def _moments(sums: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count, total, squares = sums
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    min_std = max(float(std.max()) * _MIN_STD, 1e-6)
    return tuple(mean.tolist()), tuple(std.clamp(min=min_std).tolist())


def merge_sums(merged: dict[str, RunningMoments], part: Mapping[str, Any]) -> None:
    """Add the sums in the marker of a unit to `merged`."""
    for modality, values in part.items():
        sums = RunningMoments.from_json(values)
        merged[modality] = merged[modality] + sums if modality in merged else sums
