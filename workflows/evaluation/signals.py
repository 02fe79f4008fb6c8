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
    """One clip, real or generated, as it would be seen and heard."""

    frames: Tensor | None  # uint8 (n, H, W, 3), the first frame included
    sound: Tensor | None  # float32 (samples,)
    latents: Mapping[str, Tensor]  # raw, (n, C, ...), without the first frame's
    finite: bool  # False: latents held numbers that are not finite (replaced by zeros here)
    words: tuple[Word, ...]  # what is to be said


def decode_real_clips(evaluation_set: EvaluationSet, clips: Sequence[ClipTensors]) -> list[DecodedClip]:
    """What the codecs keep of real clips: the best that any model could do. Whole chunks only."""
    codecs, timeline = evaluation_set.codecs, evaluation_set.meta.timeline()
    out: list[DecodedClip] = []
    for chunks, group in groupby(clips, key=lambda clip: clip.chunks):
        rows: list[dict[str, Tensor]] = []
        for clip in (same := list(group)):
            latents = {VIDEO: clip.video, AUDIO: clip.audio}
            ends = {m: clock.head + timeline.count(m, chunks) for m, clock in timeline.clocks.items()}
            rows.append({m: x[: ends[m]].float() for m, x in latents.items() if x is not None and m in ends})
        out += decode_latents(codecs, rows, [c.transcript for c in same], chunks * evaluation_set.meta.chunk_seconds)
    return out


def decode_latents(
    codecs: Mapping[str, Codec], rows: Sequence[Mapping[str, Tensor]], words: Sequence[Sequence[Word]], length: Fraction
) -> list[DecodedClip]:
    """Signals of raw latents of ``length`` seconds each; those of the picture begin with the first frame's."""
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
    """The last latent may reach beyond ``length`` seconds: cut."""
    if isinstance(codec, MelCodec):
        sounds = list(codec.decode_batch(torch.stack(list(latents))))
    else:
        sounds = [codec.decode(x) for x in latents]
    config: Any = codec
    return [sound[: int(length * config.config.sample_rate)] for sound in sounds]
