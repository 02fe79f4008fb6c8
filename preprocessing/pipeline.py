"""Steps of preprocessing: a source becomes clips, each encoded or rejected with a reason."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

from mfcore.codecs.factory import codec_from_config
from mfcore.codecs.hashed_words import HashedWordEncoder
from mfcore.codecs.t5 import T5TextEncoder
from mfcore.timeline import Timeline, whole_frames
from mfcore.types import AUDIO, VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.prefetch import group_consecutive, prefetch
from preprocessing.io.storage import local_copy
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, MediaInfo, probe
from preprocessing.people.face_step import crop_to_face
from preprocessing.people.packages import check_packages
from preprocessing.people.speech_step import check_speech
from preprocessing.records import Clip, Rejected, Source
from preprocessing.sources.discovery import edge_fingerprint, split_fragment
from preprocessing.sources.sidecar import attach_text, read_sidecar
from preprocessing.spans import SpanPlan
from preprocessing.steps.av_sync import build_estimator, check_sync
from preprocessing.steps.caption import add_captions, caption_folder
from preprocessing.steps.encode import Encoders, encode_batch, encode_clip
from preprocessing.steps.fingerprint import fingerprint
from preprocessing.steps.quality_filters import check_audio, check_duration, check_source, check_video
from preprocessing.steps.segment import cut_spans
from preprocessing.steps.transcribe import transcribe, whisper_folder

ClipStep = tuple[str, Callable[[Clip], Clip]]
"""Name and function of a step; the function raises Rejected to exclude the clip."""
_DECODE_REASONS = ("timeout", "memory", "killed", "time_limit", "too_many_frames")
MAX_DECODER_ATTEMPTS = 5  # for a source with a decoder that is ended from outside, e.g. by the OOM killer


class StepTimer:
    """Record of a unit: seconds of steps by name, and warnings about its sources."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.warnings: dict[str, None] = {}  # in order; a source that is read again repeats its own

    def warn(self, message: str) -> None:
        """Add a warning."""
        self.warnings[message] = None

    def merge(self, other: "StepTimer") -> None:
        """Add the times and warnings of another timer."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.warnings |= other.warnings

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        """Add the time of a ``with`` block to step `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def build_encoders(config: PreprocessConfig) -> Encoders:
    """Return the codecs of the modalities, their clocks and the text encoder."""
    build_estimator(config.sync)  # raises if weights are missing
    if config.people:
        check_packages()  # likewise
    if config.whisper:
        whisper_folder(config.whisper)  # likewise
    if config.caption and config.caption.weights:
        caption_folder(config.caption)  # likewise
    codecs = {
        m: codec_from_config({VIDEO: config.video, AUDIO: config.audio}[m], config.device) for m in config.modalities
    }
    words = (
        T5TextEncoder(config.text, config.device) if config.text else HashedWordEncoder(config.text_width, config.words)
    )
    timeline = Timeline(clocks={m: c.clock for m, c in codecs.items()}, chunk_seconds=config.chunk_seconds)
    return Encoders(codecs=codecs, words=words, timeline=timeline)


def span_plan(config: PreprocessConfig, timeline: Timeline) -> SpanPlan:
    """Return the frames and samples of 0, 1, ... whole chunks.

    Frames cover the video latents and the last chunk. The last audio latent may end after the last chunk. Its samples
    are from the source if present, else the codec pads them.
    """
    max_chunks = int(config.window_seconds / config.chunk_seconds)

    def latents_end(modality: str, chunks: int) -> Fraction:
        """Return the end of the latents of `chunks` chunks in seconds."""
        clock = timeline.clocks.get(modality)
        return clock.start(timeline.bounds(modality, chunks - 1)[1]) if clock and chunks else Fraction(0)

    counts = range(max_chunks + 1)
    ends = [max(k * config.chunk_seconds, latents_end(VIDEO, k)) for k in counts]
    return SpanPlan(
        frames=[max(1, whole_frames(end, config.fps)) for end in ends],
        samples=[whole_frames(latents_end(AUDIO, k), Fraction(config.sample_rate)) for k in counts],
        step=round(max_chunks * config.chunk_seconds * config.fps),
        min_chunks=config.min_chunks,
        chunk=config.chunk_seconds * config.fps,
    )


# --------------------------------------------------------------------------------------------------------------- steps


def build_clip_steps(config: PreprocessConfig, encoders: Encoders) -> list[ClipStep]:
    """Return the steps that follow cutting a clip, in order; they run on CPU workers."""
    plan = span_plan(config, encoders.timeline)
    min_frames = plan.frames[config.min_chunks]
    fps, rate = float(config.fps), config.sample_rate
    return [
        ("duration", partial(check_duration, min_frames=min_frames, fps=fps, sample_rate=rate)),
        *_people_steps(config),
        ("picture", partial(check_video, config=config.filters)),
        ("sound", partial(check_audio, config=config.filters)),
        ("sync", partial(check_sync, config=config.sync, plan=plan, fps=config.fps, sample_rate=rate)),
        ("fingerprint", partial(fingerprint, sample_rate=rate)),
        ("text", partial(attach_text, max_letters=config.limits.transcript_letters)),
    ]


def _people_steps(config: PreprocessConfig) -> list[ClipStep]:
    """Return the steps that select clips in which one person speaks."""
    if config.people is None:
        return []
    speech = partial(check_speech, config=config.people, sample_rate=config.sample_rate)
    face = partial(crop_to_face, config=config.people, target_size=config.target_size, fps=float(config.fps))
    return [("face", face), ("voice", speech)]


def build_model_steps(config: PreprocessConfig) -> list[ClipStep]:
    """Return the steps with models on the device of the encoders, between the steps of a clip and its encoding."""
    return [
        ("speech", partial(transcribe, config=config.whisper, device=config.device, sample_rate=config.sample_rate)),
    ]


def _check_streams(info: MediaInfo, config: PreprocessConfig) -> None:
    if VIDEO in config.modalities and info.video is None:
        raise Rejected("probe", "no_video", "no video stream that can be decoded")
    if AUDIO in config.modalities and info.audio is None:
        stream = "no audio stream" if config.audio_track is None else f"no audio stream {config.audio_track}"
        raise Rejected("probe", "no_audio", f"{stream} that can be decoded")
    if info.video is not None and VIDEO in config.modalities:
        check_source(info.video, config.filters)


def _check_length(info: MediaInfo, within: tuple[float, float | None] | None, max_seconds: float) -> None:
    """Raise Rejected if the header claims more than `max_seconds` for the source, or for the part `within` it."""
    start, end = within or (0.0, None)
    length = (info.duration if end is None else min(end, info.duration)) - start
    if length > max_seconds:
        raise Rejected("filter", "too_long", f"{length:.0f} s, at most limits.claimed_seconds={max_seconds:g}")


def cut_source(
    source: Source, config: PreprocessConfig, plan: SpanPlan, timer: StepTimer
) -> Generator[Clip | Rejected]:
    """Yield the clips of one source: read sidecar files, probe, decode and cut."""
    if source.duplicate_of is not None:
        raise Rejected("duplicates", "duplicate", f"same bytes as {source.duplicate_of}")
    origin = "manifest" if source.transcript is not None else "sidecar"
    caption_origin = "manifest" if source.caption else "sidecar"
    source = read_sidecar(source, config.limits, timer.warn)
    base, within = split_fragment(source.uri)
    with local_copy(base) as path:
        with timer.measure("probe"):
            info = probe(
                path, timeout=config.stall_seconds, memory=config.decoder_bytes, audio_track=config.audio_track
            )
        _check_streams(info, config)
        _check_length(info, within, config.limits.claimed_seconds)
        size = config.sizes[0] if info.video is None else config.decoded_size(info.video.display_size)
        facts: dict[str, Any] = {
            "source_scale": min(info.video.display_size) / min(size) if info.video else 1.0,
            "content": edge_fingerprint(path),
            "source_fps": info.video.fps if info.video else None,
            "caption_source": caption_origin if source.caption else "",
            "transcript_source": "" if source.transcript is None else origin,
        }
        with Decoder(
            path,
            info,
            fps=config.fps,
            size=size,
            sample_rate=config.sample_rate,
            streams=(VIDEO in config.modalities, AUDIO in config.modalities),
            fit=config.fit,
            start=None if within is None else info.origin + within[0],
            stall_seconds=config.stall_seconds,
            wall_seconds=config.limits.wall_seconds,
            gap_seconds=config.limits.gap_seconds,
            memory=config.decoder_bytes,
            cut_score=config.scenes.threshold,
        ) as decoder:
            for clip in cut_spans(
                decoder,
                info,
                source,
                plan,
                scenes=config.scenes,
                until=None if within is None else within[1],
                max_frames=config.limits.decoded_frames,
            ):
                yield clip if isinstance(clip, Rejected) else replace(clip, **facts)


def process_sources(
    sources: Sequence[Source], config: PreprocessConfig, encoders: Encoders, timer: StepTimer | None = None
) -> Generator[tuple[Source, Clip | Rejected]]:
    """Yield every span of the sources in order, encoded or rejected.

    Failures of sources and steps are not raised. With pretrained codecs, a thread decodes the next clips meanwhile.
    """
    timer = timer or StepTimer()
    prepared = prepare_sources(sources, config, encoders, timer)
    if config.weight_folders:
        prepared = prefetch(prepared, _item_bytes, config.encoder.ahead_bytes)
    with closing(prepared):
        for group in group_clips(prepared, config):
            yield from encode_group(group, config, encoders, timer)


def prepare_sources(
    sources: Sequence[Source], config: PreprocessConfig, encoders: Encoders, timer: StepTimer
) -> Generator[tuple[Source, Clip | Rejected]]:
    """Yield every span of the sources in order, ready for encoding or rejected. Needs no weights."""
    for source in sources:
        for found in prepare_clips(source, config, encoders, timer):
            yield source, found


def group_clips(
    prepared: Iterator[tuple[Source, Clip | Rejected]], config: PreprocessConfig
) -> Generator[list[tuple[Source, Clip | Rejected]]]:
    """Yield groups of consecutive items that are encoded together: clips of one shape, or rejects.

    Models take up to ``encoder.batch`` clips together, embedded codecs single clips.
    """
    return group_consecutive(prepared, _batch_shape, config.encoder.batch if config.uses_models else 1)


def encode_group(
    group: Sequence[tuple[Source, Clip | Rejected]], config: PreprocessConfig, encoders: Encoders, timer: StepTimer
) -> list[tuple[Source, Clip | Rejected]]:
    """Run the steps with models and encode the clips of one group as a batch.

    If a batch fails, its clips are encoded separately, and the failing one is rejected.
    """

    def encode_one(clip: Clip) -> Clip | Rejected:
        return _run_steps(clip, [("encode", partial(encode_clip, encoders=encoders))], timer)

    steps = build_model_steps(config)
    found = [item if isinstance(item, Rejected) else _run_steps(item, steps, timer) for _, item in group]
    found = _caption(found, config, timer)
    clips = [item for item in found if isinstance(item, Clip)]
    if config.weight_folders and clips:
        with timer.measure("encode"):
            encoded = iter(encode_batch(clips, encoders, encode_one))
    else:
        encoded = map(encode_one, clips)
    return [
        (source, item if isinstance(item, Rejected) else next(encoded))
        for (source, _), item in zip(group, found, strict=True)
    ]


def _caption(found: list[Clip | Rejected], config: PreprocessConfig, timer: StepTimer) -> list[Clip | Rejected]:
    """Return the items with captions; if a batch fails, clips are captioned separately to find the failing one."""
    if config.caption is None:
        return found
    add = partial(add_captions, config=config.caption, device=config.device)
    clips = [item for item in found if isinstance(item, Clip)]
    try:
        with timer.measure("caption"):
            done: Iterator[Clip | Rejected] = iter(add(clips))
    except Exception:
        done = iter([_run_steps(clip, [("caption", lambda clip: add([clip])[0])], timer) for clip in clips])
    return [next(done) if isinstance(item, Clip) else item for item in found]


def _item_bytes(item: tuple[Source, Clip | Rejected]) -> int:
    """Return the bytes of frames and audio of an item."""
    _, found = item
    return 0 if isinstance(found, Rejected) else sum(x.nbytes for x in (found.frames, found.waveform) if x is not None)


def _batch_shape(item: tuple[Source, Clip | Rejected]) -> tuple[int, ...] | None:
    """Return the shape that clips of one batch share; None for a reject."""
    _, found = item
    if isinstance(found, Rejected):
        return None
    frames, sound = found.frames, found.waveform
    return (*(frames.shape if frames is not None else ()), -1 if sound is None else len(sound))


def prepare_clips(
    source: Source, config: PreprocessConfig, encoders: Encoders, timer: StepTimer
) -> Iterator[Clip | Rejected]:
    """Yield every span of a source, ready for encoding or rejected."""
    plan, steps = span_plan(config, encoders.timeline), build_clip_steps(config, encoders)
    clips = _retry_killed(partial(cut_source, source, config, plan, timer))
    try:
        while True:
            with timer.measure("decode"):  # time timer waiting for ffmpeg, including probing
                clip = next(clips, None)
            if clip is None:
                return
            yield clip if isinstance(clip, Rejected) else _run_steps(clip, steps, timer)
    except Rejected as rejected:
        yield rejected
    except MediaError as error:
        yield Rejected("decode" if error.reason in _DECODE_REASONS else "probe", error.reason, error.detail)
    except InfrastructureError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        yield Rejected("probe", "unreadable", f"{type(error).__name__}: {error}")
    except Exception as error:  # a bad file must not end the run; the reject row has the error
        yield Rejected("source", "error", f"{type(error).__name__}: {error}")
    finally:
        clips.close()


def _retry_killed(cut: Callable[[], Generator[Clip | Rejected]]) -> Generator[Clip | Rejected]:
    """Yield the items of `cut`, restarted without repetition if its decoder is killed."""
    yielded = 0
    for attempt in range(1, MAX_DECODER_ATTEMPTS + 1):
        with closing(cut()) as clips:
            try:
                for clip in islice(clips, yielded, None):
                    yielded += 1
                    yield clip
                return
            except MediaError as error:
                if error.reason != "killed" or attempt == MAX_DECODER_ATTEMPTS:
                    raise


def _run_steps(clip: Clip, steps: Sequence[tuple[str, Callable[[Clip], Clip]]], timer: StepTimer) -> Clip | Rejected:
    span = clip.span
    for name, step in steps:
        try:
            with timer.measure(name):
                clip = step(clip)
        except Rejected as rejected:
            return Rejected(rejected.step, rejected.reason, rejected.detail, span)
        except InfrastructureError:
            raise
        except Exception as error:  # likewise
            return Rejected(name, "error", f"{type(error).__name__}: {error}", span)
    return clip
