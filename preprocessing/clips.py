"""A source -> its clips: spans that begin with their own first frame and hold whole chunks, cut in one pass.

Spans start on chunk boundaries, counted from the first frame of the source. The frame that ends a span's last chunk is
also the first frame (the condition) of the next span. A span's sound reaches as far as its last latent does, beyond
the last chunk where the source goes on. What remains behind the last span is shorter than the least number of chunks
and is not a span; a source that is too short altogether gives one short clip, for the duration filter to reject.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from preprocessing.media import Decoder
from preprocessing.probe import MediaInfo
from preprocessing.record import Clip, Rejected, Source

# A file ended early when this much of what its header claims is missing, and ffmpeg complained. A header alone is no
# proof: the claim may be of a longer stream that is not decoded, or plainly wrong.
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.05


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """How long spans are."""

    frames: Sequence[int]  # frames that k whole chunks take, at index k, up to the longest span
    samples: Sequence[int]  # samples that the latents of k whole chunks describe, where the source has them
    step: int  # frames from the start of a full span to the start of the next
    least: int  # chunks of the shortest span


def cut(
    decoder: Decoder, info: MediaInfo, source: Source, plan: SpanPlan, until: float | None = None
) -> Iterator[Clip | Rejected]:
    """The clips of a decoder's stream in order, at most one of them in memory.

    ``until``: seconds after the origin at which to stop. A failure of the decoder behind good spans, or an end before
    the file's own, comes as a last Rejected with the span that was lost; before any frame it is raised.
    """
    origin = decoder.start - info.origin  # of frame 0, seconds after the source's origin
    limit = None if until is None else round((until - origin) * decoder.fps)
    frames, sound, first = None, None, 0
    while True:
        want = plan.frames[-1] if limit is None else min(plan.frames[-1], limit - first)
        more_frames, more_sound = decoder.read(max(0, want - _length(frames, sound, decoder)))
        frames, sound = _join(frames, more_frames), _join(sound, more_sound)
        have = _length(frames, sound, decoder)
        chunks = bisect_right(plan.frames, have) - 1
        if chunks >= plan.least:
            whole = _extended(sound, plan.samples[chunks], decoder)
            yield _clip(source, decoder, origin, (first, plan.frames[chunks]), frames, whole, plan.samples[chunks])
        elif first == 0 and have > 0:
            yield _clip(source, decoder, origin, (first, have), frames, sound)
        if have < plan.frames[-1]:
            break
        frames = None if frames is None else frames[plan.step :]
        sound = None if sound is None else sound[_samples(decoder, first, first + plan.step) :]
        first += plan.step
    if limit is None or first + have < max(1, limit):
        yield from _lost(decoder, info, origin, first + have, until)


def _lost(decoder: Decoder, info: MediaInfo, origin: float, frames: int, until: float | None) -> Iterator[Rejected]:
    """What should have followed the ``frames`` that were decoded, if anything."""
    failure, said = decoder.error(), decoder.complaints()
    if frames == 0:
        raise Rejected("decode", "no_frames", failure or "ffmpeg decoded nothing and did not say why")
    decoded = origin + float(frames / decoder.fps)
    claimed = info.duration if until is None else min(until, info.duration)
    missing = claimed - (origin + decoder.end)
    if failure is not None:
        yield Rejected("decode", "decode_error", failure, (decoded, max(decoded, claimed)))
    elif said and missing > min(MISSING_SECONDS, MISSING_SHARE * claimed):
        detail = f"ends {missing:.3f} s before the {claimed:.3f} s that its header claims: {said[-1]}"
        yield Rejected("decode", "truncated", detail, (decoded, claimed))


def _samples(decoder: Decoder, first: int, last: int) -> int:
    rate: Fraction = decoder.sample_rate / decoder.fps
    return round(last * rate) - round(first * rate)


def _join(old: np.ndarray | None, new: np.ndarray | None) -> np.ndarray | None:
    if new is None or old is None:
        return new
    return np.concatenate([old, new])


def _length(frames: np.ndarray | None, sound: np.ndarray | None, decoder: Decoder) -> int:
    """Frames in hand; without a picture, whole frame times of sound."""
    if frames is not None:
        return len(frames)
    return 0 if sound is None else int((len(sound) + 1) * decoder.fps / decoder.sample_rate)


def _extended(sound: np.ndarray | None, samples: int, decoder: Decoder) -> np.ndarray | None:
    """Sound of at least ``samples`` where the source has them; none of it is taken from the next span."""
    if sound is None or len(sound) >= samples:
        return sound
    return np.concatenate([sound, decoder.ahead(samples - len(sound))])


def _clip(
    source: Source,
    decoder: Decoder,
    origin: float,
    place: tuple[int, int],
    frames: np.ndarray | None,
    sound: np.ndarray | None,
    reach: int = 0,
) -> Clip:
    """The clip of ``place`` = (first frame, frames), with sound of at least ``reach`` samples where it is at hand."""
    first, count = place
    start = origin + float(first / decoder.fps)
    return Clip(
        source=source,
        span=(round(start, 6), round(start + float(count / decoder.fps), 6)),
        frames=None if frames is None else frames[:count],
        waveform=None if sound is None else sound[: max(reach, _samples(decoder, first, first + count))],
    )
