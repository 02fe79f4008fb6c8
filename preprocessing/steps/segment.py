"""Cut a source into clips: spans of whole chunks within one scene, in one pass.

Spans start on chunk boundaries, counted from the first frame of the source, or on the first boundary in a new scene.
The last frame of a span is also the first frame (the condition) of the next span. The audio of a span ends with its
last latent, which may be after the last chunk. The rest of a scene after its last span is too short for a clip and is
dropped. A scene without a span is one reject. A source that is too short yields one short clip, which the duration
filter rejects.

A chunk of K seconds ends with a frame at exactly K, where a source of K seconds has no frame. Its last frame, displayed
until then, is repeated.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, MediaInfo, is_out_of_memory
from preprocessing.media.scene_cuts import SceneConfig, SceneCutDetector
from preprocessing.records import Clip, Frames, Rejected, Source, Waveform
from preprocessing.spans import SpanPlan

# A file is truncated if so much of the duration in its header is missing and ffmpeg reported an error. The header alone
# proves nothing: it may be wrong, or describe a longer stream that is not decoded.
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.05
_ENDS = ("timeout", "time_limit", "too_many_frames")  # reasons that keep the clips before


@dataclass(frozen=True, kw_only=True)
class _Portion:
    """Output of the decoder from frame `first`."""

    first: int
    frames: Frames | None
    sound: Waveform | None
    length: int  # frames, at most a full span
    cut: int | None  # first frame of the next scene, if within the window


def cut_spans(
    decoder: Decoder,
    info: MediaInfo,
    source: Source,
    plan: SpanPlan,
    *,
    scenes: SceneConfig | None = None,
    until: float | None = None,
    max_frames: int | None = None,
) -> Iterator[Clip | Rejected]:
    """Yield the clips of a decoder's stream in order, at most one of them in memory.

    A failure of the decoder after good spans, or a truncated file, is yielded last as a Rejected with the lost span. It
    is raised if there was no frame. MediaError(killed) is always raised; all clips before it are valid.

    Args:
        decoder: Decoder at the start of the span.
        info: Result of `probe`.
        source: Source of the clips.
        plan: Lengths of spans.
        scenes: Thresholds of scene cuts; None: no cuts.
        until: Stop so many seconds after the origin; None: at the end.
        max_frames: Reject the rest after so many frames; None: no limit.
    """
    claimed = info.duration if until is None else min(until, info.duration)
    window = _Window(
        decoder,
        source=source,
        plan=plan,
        scenes=scenes or SceneConfig(threshold=None),
        origin=info.origin,
        until=until,
        max_frames=max_frames,
    )
    first, scene, spans = 0, 0, 0  # frame of the next span, first frame of its scene, spans of the scene so far
    while True:
        try:
            portion = window.decode(first)
        except MediaError as error:
            if error.reason not in _ENDS or first == 0:
                raise
            yield window.stalled(first, claimed, error)
            return
        chunks = bisect_right(plan.frames, portion.length) - 1
        if chunks >= plan.min_chunks:
            yield window.clip(portion, chunks)
            spans += 1
        elif spans == 0 and (portion.cut or scene) and first + portion.length > scene:
            yield window.short_scene(scene, first + portion.length, plan)
        elif first == 0 and portion.length > 0:
            yield window.whole(portion)
        if portion.cut is not None:
            first = plan.next_boundary(portion.cut)
            scene, spans = portion.cut, 0
        elif portion.length == plan.frames[-1]:
            first += plan.step
        else:
            break
    if window.limit is None or first + portion.length < max(1, window.limit):
        yield from _rest(decoder, window, claimed, first + portion.length)


def _rest(decoder: Decoder, window: "_Window", claimed: float, frames: int) -> Iterator[Rejected]:
    """Yield the reject of what is lost after the last of the decoded `frames`, if any."""
    try:
        yield from _lost(decoder, claimed, origin=window.origin, frames=frames)
    except MediaError as error:
        if error.reason not in _ENDS or frames == 0:
            raise
        yield window.stalled(frames, claimed, error)


class _Window:
    """Window of a full span that moves through a decoder's stream."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        source: Source,
        plan: SpanPlan,
        scenes: SceneConfig,
        origin: float,
        until: float | None,
        max_frames: int | None,
    ) -> None:
        self.origin = decoder.start - origin  # seconds of frame 0 after the origin of the source
        self.limit = None if until is None else round((until - self.origin) * decoder.fps)
        self._decoder, self._source = decoder, source
        self._plan, self._max_frames = plan, max_frames
        self._margin = 0 if scenes.threshold is None else round(scenes.flash_seconds * decoder.fps)
        self._cuts = None if scenes.threshold is None else SceneCutDetector(scenes, self._margin)
        self._position = 0  # frames that were skipped

    def decode(self, first: int) -> _Portion:
        """Return the stream from frame `first`, which must not be before that of the last call.

        Raise MediaError if the decoder fails, or for more than `max_frames`.
        """
        if self._max_frames is not None and first >= self._max_frames:
            detail = f"the source has more frames than limits.decoded_frames={self._max_frames}"
            raise MediaError("too_many_frames", detail)
        decoder, full = self._decoder, self._plan.frames[-1]
        decoder.skip(first - self._position)
        self._position = first
        wanted = full if self.limit is None else max(0, min(full, self.limit - first))
        frames, sound = decoder.peek_frames(wanted + self._margin)
        length = min(wanted, _length(frames, sound, decoder))
        cut = None
        if self._cuts is not None and frames is not None:
            cut = self._cuts.next_cut(decoder.scene_changes(), first, frames)
            cut = None if cut is None or cut - first >= length else cut
        if cut is not None:
            return _Portion(first=first, frames=frames, sound=sound, length=cut - first, cut=cut)
        if length < full and frames is not None and length + 1 in self._plan.frames[1:]:
            frames = np.concatenate([frames[:length], frames[length - 1 : length]])
            length += 1
        return _Portion(first=first, frames=frames, sound=sound, length=length, cut=None)

    def clip(self, portion: _Portion, chunks: int) -> Clip:
        """Return the first `chunks` of a portion with the audio that their latents describe."""
        samples = self._plan.samples[chunks]
        sound = portion.sound
        if sound is not None and (len(sound) < samples or not len(self._decoder.peek_audio(samples))):
            sound = self._decoder.peek_audio(samples)  # empty: not the silence that follows the end of the audio
        return self._clip(portion, self._plan.frames[chunks], sound, samples)

    def whole(self, portion: _Portion) -> Clip:
        """Return all of a portion as a clip."""
        return self._clip(portion, portion.length, portion.sound)

    def _clip(self, portion: _Portion, count: int, sound: Waveform | None, min_samples: int = 0) -> Clip:
        samples = _samples(self._decoder, portion.first, portion.first + count)
        return Clip(
            source=self._source,
            span=self._span(portion.first, portion.first + count),
            frames=None if portion.frames is None else portion.frames[:count],
            waveform=None if sound is None else sound[: max(min_samples, samples)],
        )

    def short_scene(self, first: int, last: int, plan: SpanPlan) -> Rejected:
        """Return the reject of a scene that is shorter than the shortest span."""
        last = max(first + 1, min(last, round(self._decoder.end_seconds * self._decoder.fps)))
        seconds = float((last - first) / self._decoder.fps)
        detail = f"a scene of {seconds:.3f} s has fewer than {plan.min_chunks} whole chunks"
        return Rejected("scenes", "short_scene", detail, self._span(first, last))

    def stalled(self, first: int, claimed: float, error: MediaError) -> Rejected:
        """Return the reject of the rest of a source after a timeout of the decoder."""
        start, _ = self._span(first, first)
        return Rejected("decode", error.reason, error.detail, (start, max(start, claimed)))

    def _span(self, first: int, last: int) -> tuple[float, float]:
        fps = self._decoder.fps
        return (round(self.origin + float(first / fps), 6), round(self.origin + float(last / fps), 6))


def _lost(decoder: Decoder, claimed: float, *, origin: float, frames: int) -> Iterator[Rejected]:
    """Yield the reject of the missing span after the decoded `frames`, if any."""
    failure, lines = decoder.failure(), decoder.stderr_lines()
    out_of_memory = failure is not None and is_out_of_memory(lines)
    gap = None if decoder.gap is None else f"the timestamps jump to {decoder.gap:.3f} s"
    if frames == 0 and gap:
        raise Rejected("decode", "timestamp_gap", gap)
    if frames == 0:
        why = failure or "ffmpeg decoded nothing and reported no error"
        raise Rejected("decode", "memory" if out_of_memory else "no_frames", why)
    decoded = origin + float(frames / decoder.fps)
    missing = claimed - (origin + decoder.end_seconds)
    if gap:
        yield Rejected("decode", "timestamp_gap", gap, (decoded, max(decoded, claimed)))
    elif failure is not None:
        yield Rejected(
            "decode", "memory" if out_of_memory else "decode_error", failure, (decoded, max(decoded, claimed))
        )
    elif lines and missing > min(MISSING_SECONDS, MISSING_SHARE * claimed):
        detail = f"ends {missing:.3f} s before the {claimed:.3f} s of its header: {lines[-1]}"
        yield Rejected("decode", "truncated", detail, (decoded, claimed))


def _samples(decoder: Decoder, first: int, last: int) -> int:
    rate: Fraction = decoder.sample_rate / decoder.fps
    return round(last * rate) - round(first * rate)


def _length(frames: Frames | None, sound: Waveform | None, decoder: Decoder) -> int:
    """Return the number of decoded frames; without video, the whole frame times of audio."""
    if frames is not None:
        return len(frames)
    return 0 if sound is None else int((len(sound) + 1) * decoder.fps / decoder.sample_rate)
