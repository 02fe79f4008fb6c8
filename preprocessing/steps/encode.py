"""Frames and sound -> raw latents, words -> embeddings; and the per-channel sums from which statistics come."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfcore.codecs.base import Codec, TextCodec
from mfcore.codecs.stats import LatentStats
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from preprocessing.io.prefetch import group_consecutive, prefetch
from preprocessing.records import Clip, Rejected, Source

# A channel that never varies (the colour of a grey corpus) has no scale of its own: it gets this share of the largest.
_LEAST_STD = 1e-3


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What one worker keeps loaded: the codec of each modality present, and the text encoder."""

    codecs: Mapping[str, Codec]
    words: TextCodec
    timeline: Timeline

    def load(self) -> None:
        """Fetch all weights now: where some are missing the run ends, not each of its clips."""
        for codec in (*self.codecs.values(), self.words):
            codec.load()


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How pretrained codecs run; embedded ones take clip after clip."""

    batch: int = 4  # clips of one shape encoded together
    gpus: float = 0.0  # share of a GPU that each worker has, e.g. 0.25; 0: all on the CPU, in float32
    ahead_bytes: int = 1 << 30  # of decoded clips that wait while others are encoded, per worker

    def __post_init__(self) -> None:
        if self.batch < 1 or self.gpus < 0 or self.ahead_bytes < 1:
            raise ValueError(f"encoder.batch and ahead_bytes must be at least 1, gpus not negative; got {self}")


def encode_clip(clip: Clip, encoders: Encoders) -> Clip:
    """The clip with the latents of its whole chunks (after each codec's head) and the embeddings of its text."""
    signals: dict[str, Any] = {VIDEO: clip.frames, AUDIO: clip.waveform}
    latents = {m: codec.encode(torch.from_numpy(signals[m])) for m, codec in encoders.codecs.items()}
    return _encoded(clip, latents, encoders)


def encode_batch(clips: Sequence[Clip], encoders: Encoders) -> list[Clip]:
    """The same of several clips of one shape at once."""
    latents = {m: codec.encode_batch(_signals(clips, m)) for m, codec in encoders.codecs.items()}
    return [_encoded(clip, {m: x[i] for m, x in latents.items()}, encoders) for i, clip in enumerate(clips)]


def encode_prefetched(
    prepared: Generator[tuple[Source, Clip | Rejected]],
    one: Callable[[Clip], Clip | Rejected],
    encoders: Encoders,
    config: EncoderConfig,
) -> Generator[tuple[Source, Clip | Rejected]]:
    """All that ``prepared`` gives, its clips encoded: those of one shape that follow each other together, while a
    thread prepares the next ones. ``one`` encodes a clip of a group that failed, so that a bad one goes alone."""

    def waiting_bytes(item: tuple[Source, Clip | Rejected]) -> int:
        return _bytes(item[1]) if isinstance(item[1], Clip) else 0

    def kind(item: tuple[Source, Clip | Rejected]) -> tuple[int, ...] | None:
        return _shape(item[1]) if isinstance(item[1], Clip) else None

    with closing(prefetch(prepared, waiting_bytes, config.ahead_bytes)) as waiting:
        for run in group_consecutive(waiting, kind, config.batch):
            clips = [found for _, found in run if isinstance(found, Clip)]
            done = _encode_run(clips, one, encoders) if clips else [found for _, found in run]
            yield from zip((source for source, _ in run), done, strict=True)


def _encode_run(
    clips: list[Clip], one: Callable[[Clip], Clip | Rejected], encoders: Encoders
) -> Sequence[Clip | Rejected]:
    try:
        return encode_batch(clips, encoders)
    except torch.OutOfMemoryError as error:  # the machine's fault, not the clips'
        raise RuntimeError(
            f"{len(clips)} clips together do not fit on the GPU: lower encoder.batch, or raise encoder.gpus so that "
            "fewer workers share it"
        ) from error
    except Exception:  # whatever it is, the clip that has it will say it alone
        return [one(clip) for clip in clips]


def _signals(clips: Sequence[Clip], modality: str) -> Tensor:
    arrays: list[Any] = [clip.frames if modality == VIDEO else clip.waveform for clip in clips]
    return torch.from_numpy(np.stack(arrays))


def _shape(clip: Clip) -> tuple[int, ...]:
    """Clips that agree in it can be encoded together."""
    frames, sound = clip.frames, clip.waveform
    return (*(frames.shape if frames is not None else ()), -1 if sound is None else len(sound))


def _bytes(clip: Clip) -> int:
    """Bytes of its frames and sound."""
    return sum(array.nbytes for array in (clip.frames, clip.waveform) if array is not None)


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
    """Seconds since the start of the clip at which each latent starts; the first-frame latent is at 0."""
    times = {}
    for modality, x in latents.items():
        clock = timeline.clocks[modality]
        times[modality] = [0.0] * clock.head + [float(clock.start(i)) for i in range(len(x) - clock.head)]
    return times


@dataclass
class RunningMoments:
    """Count, sum and sum of squares of one modality's latents per channel, head and rest apart (float64)."""

    head: Tensor  # (3, C)
    rest: Tensor  # (3, C)

    @classmethod
    def zeros(cls, channels: int) -> "RunningMoments":
        return cls(*(torch.zeros(3, channels, dtype=torch.float64) for _ in range(2)))

    def add(self, latents: Tensor, head: int) -> None:
        """Count one clip's latents ``(n, C, *space)``, the first ``head`` of them apart."""
        self.head += _sums(latents[:head])
        self.rest += _sums(latents[head:])

    def __add__(self, other: "RunningMoments") -> "RunningMoments":
        return RunningMoments(self.head + other.head, self.rest + other.rest)

    def to_json(self) -> dict[str, Any]:
        return {"head": self.head.tolist(), "rest": self.rest.tolist()}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "RunningMoments":
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


def merge_sums(merged: dict[str, RunningMoments], part: Mapping[str, Any]) -> None:
    """Add a unit's sums, as its marker has them, to those of the units before it."""
    for modality, facts in part.items():
        sums = RunningMoments.from_json(facts)
        merged[modality] = merged[modality] + sums if modality in merged else sums
