"""A source -> its clips: spans of one scene that begin with their own first frame and hold whole chunks, in one pass.

Spans start on chunk boundaries, counted from the first frame of the source, or on the first boundary in a new scene.
The frame that ends a span's last chunk is also the first frame (the condition) of the next span. A span's sound reaches
as far as its last latent does, beyond the last chunk where the source goes on. What remains behind the last span of a
scene is shorter than the least number of chunks and is not a span; a scene that gave none is one reject, and a source
that is too short altogether gives one short clip, for the duration filter to reject.

The closing frame. Chunks of K seconds end with a frame at exactly K, where a source of K seconds has just ended. There
its last picture, which was shown until then, is shown once more.
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

# A file ended early when this much of what its header claims is missing, and ffmpeg complained. A header alone is no
# proof: the claim may be of a longer stream that is not decoded, or plainly wrong.
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.05


@dataclass(frozen=True, kw_only=True)
class _Portion:
    """What a decoder shows from frame ``first`` on."""

    first: int
    frames: Frames | None
    sound: Waveform | None
    length: int  # frames, at most those of a full span
    cut: int | None  # the scene ends with the frame before this one, which is within ``length``


def cut_spans(
    decoder: Decoder,
    info: MediaInfo,
    source: Source,
    plan: SpanPlan,
    *,
    scenes: SceneConfig | None = None,
    until: float | None = None,
) -> Iterator[Clip | Rejected]:
    """The clips of a decoder's stream in order, at most one of them in memory.

    ``until``: seconds after the origin at which to stop. A failure of the decoder behind good spans, or an end before
    the file's own, comes as a last Rejected with the span that was lost; before any frame it is raised. So is, at any
    time, MediaError(killed), behind nothing that an undisturbed decoder would not have given.
    """
    window = _Window(
        decoder,
        source=source,
        plan=plan,
        scenes=scenes or SceneConfig(threshold=None),
        origin=info.origin,
        until=until,
    )
    first, scene, given = 0, 0, 0  # frame of the next span, first frame of its scene, spans that the scene gave
    while True:
        try:
            portion = window.look(first)
        except MediaError as error:
            if error.reason != "timeout" or first == 0:
                raise
            yield window.stalled(first, info.duration if until is None else min(until, info.duration), error)
            return
        chunks = bisect_right(plan.frames, portion.length) - 1
        if chunks >= plan.min_chunks:
            yield window.clip(portion, chunks)
            given += 1
        elif given == 0 and (portion.cut or scene) and first + portion.length > scene:
            yield window.short_scene(scene, first + portion.length, plan)
        elif first == 0 and portion.length > 0:
            yield window.whole(portion)
        if portion.cut is not None:
            first, scene, given = plan.next_boundary(portion.cut), portion.cut, 0
        elif portion.length == plan.frames[-1]:
            first += plan.step
        else:
            break
    if window.limit is None or first + portion.length < max(1, window.limit):
        yield from _lost(decoder, info, origin=window.origin, frames=first + portion.length, until=until)


class _Window:
    """Walks through a decoder's stream, a full span at a time, and makes clips of what it sees."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        source: Source,
        plan: SpanPlan,
        scenes: SceneConfig,
        origin: float,
        until: float | None,
    ) -> None:
        self.origin = decoder.start - origin  # of frame 0, seconds after the source's origin
        self.limit = None if until is None else round((until - self.origin) * decoder.fps)
        self._decoder, self._source, self._plan = decoder, source, plan
        self._margin = 0 if scenes.threshold is None else round(scenes.flash_seconds * decoder.fps)
        self._cuts = None if scenes.threshold is None else SceneCutDetector(scenes, self._margin)
        self._at = 0  # frames behind us

    def look(self, first: int) -> _Portion:
        """The stream from frame ``first`` on, which is not before the one of the last call."""
        decoder, full = self._decoder, self._plan.frames[-1]
        decoder.skip(first - self._at)
        self._at = first
        want = full if self.limit is None else max(0, min(full, self.limit - first))
        frames, sound = decoder.peek_frames(want + self._margin)
        have = min(want, _length(frames, sound, decoder))
        cut = None
        if self._cuts is not None and frames is not None:
            cut = self._cuts.next_cut(decoder.scene_changes(), first, frames)
            cut = None if cut is None or cut - first >= have else cut
        if cut is not None:
            return _Portion(first=first, frames=frames, sound=sound, length=cut - first, cut=cut)
        if have < full and frames is not None and have + 1 in self._plan.frames[1:]:
            frames, have = np.concatenate([frames[:have], frames[have - 1 : have]]), have + 1
        return _Portion(first=first, frames=frames, sound=sound, length=have, cut=None)

    def clip(self, portion: _Portion, chunks: int) -> Clip:
        """The first ``chunks`` of a portion, with the sound that their latents describe where it is at hand."""
        samples = self._plan.samples[chunks]
        sound = portion.sound
        if sound is not None and len(sound) < samples:
            sound = self._decoder.peek_audio(samples)
        return self._clip(portion, self._plan.frames[chunks], sound, samples)

    def whole(self, portion: _Portion) -> Clip:
        return self._clip(portion, portion.length, portion.sound)

    def _clip(self, portion: _Portion, count: int, sound: Waveform | None, reach: int = 0) -> Clip:
        own = _samples(self._decoder, portion.first, portion.first + count)
        return Clip(
            source=self._source,
            span=self._span(portion.first, portion.first + count),
            frames=None if portion.frames is None else portion.frames[:count],
            waveform=None if sound is None else sound[: max(reach, own)],
        )

    def short_scene(self, first: int, last: int, plan: SpanPlan) -> Rejected:
        last = max(first + 1, min(last, round(self._decoder.end_seconds * self._decoder.fps)))
        seconds = float((last - first) / self._decoder.fps)
        detail = f"a scene of {seconds:.3f} s has no {plan.min_chunks} whole chunks"
        return Rejected("scenes", "short_scene", detail, self._span(first, last))

    def stalled(self, first: int, claimed: float, error: MediaError) -> Rejected:
        start, _ = self._span(first, first)
        return Rejected("decode", error.reason, error.detail, (start, max(start, claimed)))

    def _span(self, first: int, last: int) -> tuple[float, float]:
        fps = self._decoder.fps
        return (round(self.origin + float(first / fps), 6), round(self.origin + float(last / fps), 6))


def _lost(decoder: Decoder, info: MediaInfo, *, origin: float, frames: int, until: float | None) -> Iterator[Rejected]:
    """What should have followed the ``frames`` that were decoded, if anything."""
    failure, said = decoder.failure(), decoder.stderr_lines()
    greedy = failure is not None and is_out_of_memory(said)
    if frames == 0:
        why = failure or "ffmpeg decoded nothing and did not say why"
        raise Rejected("decode", "memory" if greedy else "no_frames", why)
    decoded = origin + float(frames / decoder.fps)
    claimed = info.duration if until is None else min(until, info.duration)
    missing = claimed - (origin + decoder.end_seconds)
    if failure is not None:
        yield Rejected("decode", "memory" if greedy else "decode_error", failure, (decoded, max(decoded, claimed)))
    elif said and missing > min(MISSING_SECONDS, MISSING_SHARE * claimed):
        detail = f"ends {missing:.3f} s before the {claimed:.3f} s that its header claims: {said[-1]}"
        yield Rejected("decode", "truncated", detail, (decoded, claimed))


def _samples(decoder: Decoder, first: int, last: int) -> int:
    rate: Fraction = decoder.sample_rate / decoder.fps
    return round(last * rate) - round(first * rate)


def _length(frames: Frames | None, sound: Waveform | None, decoder: Decoder) -> int:
    """Frames in hand; without a picture, whole frame times of sound."""
    if frames is not None:
        return len(frames)
    return 0 if sound is None else int((len(sound) + 1) * decoder.fps / decoder.sample_rate)
