"""A source -> its clips: spans that begin with their own first frame and hold whole chunks, cut in one pass.

Spans start on chunk boundaries, counted from the first frame of the source. The frame that ends a span's last chunk is
also the first frame (the condition) of the next span. What remains behind the last span is shorter than the least
number of chunks and is not a span; a source that is too short altogether gives one short clip, for the duration filter
to reject.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from preprocessing.media import Decoder, MediaInfo
from preprocessing.record import Clip, Rejected, Source


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """How long spans are."""

    frames: Sequence[int]  # frames that k whole chunks take, at index k, up to the longest span
    step: int  # frames from the start of a full span to the start of the next
    least: int  # chunks of the shortest span


def cut(
    decoder: Decoder, info: MediaInfo, source: Source, plan: SpanPlan, until: float | None = None
) -> Iterator[Clip | Rejected]:
    """The clips of a decoder's stream in order, at most one of them in memory.

    ``until``: seconds after the origin at which to stop. A failure of the decoder behind good spans comes as a last
    Rejected with the span that was lost; before any frame it is raised.
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
            yield _clip(source, decoder, origin, first, plan.frames[chunks], frames, sound)
        elif first == 0 and have > 0:
            yield _clip(source, decoder, origin, first, have, frames, sound)
        if have < plan.frames[-1]:
            break
        frames = None if frames is None else frames[plan.step :]
        sound = None if sound is None else sound[_samples(decoder, first, first + plan.step) :]
        first += plan.step
    failure = decoder.error() if limit is None else None
    decoded = origin + float((first + have) / decoder.fps)
    if first + have == 0:
        raise Rejected("decode", "no_frames", failure or "ffmpeg decoded nothing and did not say why")
    if failure is not None:
        yield Rejected("decode", "decode_error", failure, (decoded, max(decoded, info.duration)))


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


def _clip(
    source: Source,
    decoder: Decoder,
    origin: float,
    first: int,
    count: int,
    frames: np.ndarray | None,
    sound: np.ndarray | None,
) -> Clip:
    start = origin + float(first / decoder.fps)
    return Clip(
        source=source,
        span=(round(start, 6), round(start + float(count / decoder.fps), 6)),
        frames=None if frames is None else frames[:count],
        waveform=None if sound is None else sound[: _samples(decoder, first, first + count)],
    )
