"""Decode latents of real and generated clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mfcore.codecs.base import Codec
from mfcore.codecs.mel import MelCodec
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.schema import ClipTensors
from preprocessing.records import Word
from workflows.evaluation.held_out import EvaluationSet


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Decoded signals of one clip, real or generated."""

    frames: Tensor | None  # uint8 (n, H, W, 3), including the first frame
    sound: Tensor | None  # float32 (samples,)
    latents: Mapping[str, Tensor]  # raw, (n, C, ...), without that of the first frame
    finite: bool  # False: non-finite latents were replaced by zeros
    words: tuple[Word, ...]  # transcript


def decode_real_clips(evaluation_set: EvaluationSet, clips: Sequence[ClipTensors]) -> list[DecodedClip]:
    """Decode the whole chunks of real clips. This is the upper limit for any model with these codecs."""
    codecs, timeline = evaluation_set.codecs, evaluation_set.meta.timeline()
    out: list[DecodedClip] = []
    for chunks, group in groupby(clips, key=lambda clip: clip.chunks):
        rows: list[dict[str, Tensor]] = []
        same_length = list(group)
        for clip in same_length:
            latents = {VIDEO: clip.video, AUDIO: clip.audio}
            ends = {m: clock.head + timeline.count(m, chunks) for m, clock in timeline.clocks.items()}
            rows.append({m: x[: ends[m]].float() for m, x in latents.items() if x is not None and m in ends})
        out += decode_latents(
            codecs, rows, [clip.transcript for clip in same_length], chunks * evaluation_set.meta.chunk_seconds
        )
    return out


def decode_latents(
    codecs: Mapping[str, Codec], rows: Sequence[Mapping[str, Tensor]], words: Sequence[Sequence[Word]], length: Fraction
) -> list[DecodedClip]:
    """Decode raw latents of ``length`` seconds per clip. Video latents begin with that of the first frame."""
    finite = [all(bool(x.isfinite().all()) for x in row.values()) for row in rows]
    clean = [{m: torch.nan_to_num(x, 0.0, 0.0, 0.0) for m, x in row.items()} for row in rows]
    sounds = _decode_sounds(codecs[AUDIO], [row[AUDIO] for row in clean], length) if AUDIO in rows[0] else None
    return [
        DecodedClip(
            frames=codecs[VIDEO].decode(row[VIDEO]) if VIDEO in row else None,
            sound=None if sounds is None else sounds[i],
            latents={m: x[1:] if m == VIDEO else x for m, x in row.items()},
            finite=finite[i],
            words=tuple(w for w in words[i] if (w.start + w.end) / 2 < length),
        )
        for i, row in enumerate(clean)
    ]


def _decode_sounds(codec: Codec, latents: Sequence[Tensor], length: Fraction) -> list[Tensor]:
    """Decode audio and cut it to ``length`` seconds, which the last latent may exceed."""
    if isinstance(codec, MelCodec):
        sounds = list(codec.decode_batch(torch.stack(list(latents))))
    else:
        sounds = [codec.decode(x) for x in latents]
    config: Any = codec
    return [sound[: int(length * config.config.sample_rate)] for sound in sounds]
