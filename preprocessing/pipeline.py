"""The list of steps, one work unit, and all units through Ray Data.

A worker takes a unit, runs every source of it through the steps, writes the unit's files itself and puts its marker
last; only small summaries travel through Ray. Frames never leave the worker that decoded them.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from mfcore.codecs.base import Codec
from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.mel import MelCodec, MelConfig
from mfcore.codecs.words import HashedWords
from mfcore.timeline import Timeline, whole_frames
from mfcore.types import AUDIO, VIDEO
from preprocessing.clips import SpanPlan, cut
from preprocessing.encode import ChannelSums, Encoders, encode, latent_times
from preprocessing.filters import FilterConfig, check_duration, check_picture, check_size, check_sound, estimate_sync
from preprocessing.lease import check_token
from preprocessing.manifest import Unit, canonical, digest
from preprocessing.media import Decoder
from preprocessing.probe import MediaError, MediaInfo, probe
from preprocessing.record import Clip, Rejected, Source
from preprocessing.schema import REJECTS, RowWriter, to_row
from preprocessing.sidecar import attach_text, read_sidecar
from preprocessing.source import file_name, split_fragment
from preprocessing.storage import Store, fetched

MODALITIES = {"paired": (VIDEO, AUDIO), "video": (VIDEO,), "audio": (AUDIO,)}


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Everything a dataset is a function of, beside its sources (``workers`` aside, which changes nothing in it)."""

    modality: Literal["paired", "video", "audio"] = "paired"  # paired: reject a source that lacks a stream
    size: tuple[int, int] = (64, 64)  # height, width of the encoded picture, pixels
    fit: Literal["crop", "pad"] = "crop"  # how another aspect ratio becomes this one
    chunk_seconds: Fraction = Fraction(1, 2)  # of the model that will be trained
    window_seconds: Fraction = Fraction(10)  # longest clip, its first frame not counted
    min_chunks: int = 2  # whole chunks of the shortest clip
    video: DctConfig = field(default_factory=DctConfig)  # its fps is the frame rate of the dataset
    audio: MelConfig = field(default_factory=MelConfig)  # its sample_rate is the sample rate of the dataset
    text_width: int = 64  # width of the hashed embeddings of caption and transcript
    filters: FilterConfig = field(default_factory=FilterConfig)
    latent_dtype: Literal["float32", "float16"] = "float32"
    sources_per_unit: int = 16  # sources that are processed and published together
    stall_seconds: float = 60.0  # a decoder that gives nothing for so long is stopped
    workers: int | None = None  # processes through Ray; None: one per CPU; 0: in this process, without Ray

    def __post_init__(self) -> None:
        height, width = self.size
        if height % self.video.block or width % self.video.block or height % 2 or width % 2:
            raise ValueError(
                f"size={height}x{width}: both must be even and multiples of video.block={self.video.block}"
            )
        if self.min_chunks < 1 or self.min_chunks * self.chunk_seconds > self.window_seconds:
            raise ValueError(
                f"min_chunks={self.min_chunks} of {float(self.chunk_seconds)} s do not fit into window_seconds="
                f"{float(self.window_seconds)}: choose fewer, or a longer window"
            )
        if self.sources_per_unit < 1 or (self.workers is not None and self.workers < 0) or self.text_width < 1:
            raise ValueError("sources_per_unit and text_width must be at least 1, workers at least 0")

    @property
    def modalities(self) -> tuple[str, ...]:
        return MODALITIES[self.modality]

    @property
    def fps(self) -> Fraction:
        return Fraction(self.video.fps)

    @property
    def sample_rate(self) -> int:
        return self.audio.sample_rate

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain JSON values, without what changes nothing in the dataset."""
        values: dict[str, Any] = json.loads(canonical(asdict(self)))
        del values["workers"]
        return values

    @property
    def fingerprint(self) -> str:
        return digest(self.resolved())


def build_encoders(config: PreprocessConfig) -> Encoders:
    """The codecs of the modalities present, their clocks, and the text encoder."""
    both: dict[str, Codec] = {VIDEO: DctCodec(config.video), AUDIO: MelCodec(config.audio)}
    codecs = {m: both[m] for m in config.modalities}
    timeline = Timeline(clocks={m: c.clock for m, c in codecs.items()}, chunk_seconds=config.chunk_seconds)
    return Encoders(codecs=codecs, words=HashedWords(width=config.text_width), timeline=timeline)


def span_plan(config: PreprocessConfig, timeline: Timeline) -> SpanPlan:
    """Frames and samples that 0, 1, ... whole chunks take.

    Frames: all that the video latents describe, and the sound up to the end of the last chunk. The last audio latent
    starts before that end and may describe a little more: sound where the source has it, else the codec completes it.
    """
    most = int(config.window_seconds / config.chunk_seconds)

    def reach(modality: str, chunks: int) -> Fraction:
        """Seconds at which the latents of so many chunks end."""
        clock = timeline.clocks.get(modality)
        return clock.start(timeline.bounds(modality, chunks - 1)[1]) if clock and chunks else Fraction(0)

    counts = range(most + 1)
    ends = [max(k * config.chunk_seconds, reach(VIDEO, k)) for k in counts]
    return SpanPlan(
        frames=[max(1, whole_frames(end, config.fps)) for end in ends],
        samples=[whole_frames(reach(AUDIO, k), Fraction(config.sample_rate)) for k in counts],
        step=round(most * config.chunk_seconds * config.fps),
        least=config.min_chunks,
    )


# --------------------------------------------------------------------------------------------------------------- steps


def clip_steps(config: PreprocessConfig, encoders: Encoders) -> list[tuple[str, Callable[[Clip], Clip]]]:
    """What every clip goes through after it was cut, in order."""
    least = span_plan(config, encoders.timeline).frames[config.min_chunks]
    fps, rate = float(config.fps), config.sample_rate
    return [
        ("duration", partial(check_duration, least=least, fps=fps, sample_rate=rate)),
        ("picture", partial(check_picture, config=config.filters)),
        ("sound", partial(check_sound, config=config.filters)),
        ("sync", partial(estimate_sync, fps=fps, sample_rate=rate)),
        ("text", attach_text),
        ("encode", partial(encode, encoders=encoders)),
    ]


def _check_streams(info: MediaInfo, config: PreprocessConfig) -> None:
    if VIDEO in config.modalities and info.video is None:
        raise Rejected("probe", "no_video", "no picture that can be decoded")
    if AUDIO in config.modalities and info.audio is None:
        raise Rejected("probe", "no_audio", "no sound that can be decoded")
    if info.video is not None and VIDEO in config.modalities:
        check_size(info.video, config.filters)


def cut_source(source: Source, config: PreprocessConfig, plan: SpanPlan) -> Iterator[Clip | Rejected]:
    """Sidecar, probe, decode, cut: the clips of one source, one at a time."""
    source = read_sidecar(source)
    base, within = split_fragment(source.uri)
    with fetched(base) as path:
        info = probe(path, timeout=config.stall_seconds)
        _check_streams(info, config)
        with Decoder(
            path,
            info,
            fps=config.fps,
            size=config.size,
            sample_rate=config.sample_rate,
            streams=(VIDEO in config.modalities, AUDIO in config.modalities),
            fit=config.fit,
            start=None if within is None else info.origin + within[0],
            stall_seconds=config.stall_seconds,
        ) as decoder:
            yield from cut(decoder, info, source, plan, until=None if within is None else within[1])


def process_source(source: Source, config: PreprocessConfig, encoders: Encoders) -> Iterator[Clip | Rejected]:
    """Every span of a source, finished or rejected. No failure of a source or a step leaves this function."""
    plan, steps = span_plan(config, encoders.timeline), clip_steps(config, encoders)
    try:
        for clip in cut_source(source, config, plan):
            yield clip if isinstance(clip, Rejected) else _through(clip, steps)
    except Rejected as rejected:
        yield rejected
    except MediaError as error:
        yield Rejected("decode" if error.reason == "timeout" else "probe", error.reason, error.detail)
    except Exception as error:  # a bad file must not stop a run of a million; the row says what happened
        yield Rejected("source", "error", f"{type(error).__name__}: {error}")


def _through(clip: Clip, steps: Sequence[tuple[str, Callable[[Clip], Clip]]]) -> Clip | Rejected:
    span = clip.span
    for name, step in steps:
        try:
            clip = step(clip)
        except Rejected as rejected:
            return Rejected(rejected.step, rejected.reason, rejected.detail, span)
        except Exception as error:  # as above
            return Rejected(name, "error", f"{type(error).__name__}: {error}", span)
    return clip


# ---------------------------------------------------------------------------------------------------------------- unit


def clip_id(clip: Clip) -> str:
    """A function of the source's URI and the span."""
    return digest([clip.source.uri, *(f"{second:.6f}" for second in clip.span)])


def run_unit(unit: Unit, store: Store, token: str, config: PreprocessConfig, encoders: Encoders) -> dict[str, Any]:
    """Process a unit, publish its files, then its marker, which is returned. LeaseLost when no longer ours."""
    height, width = config.size
    bucket = "audio" if config.modality == "audio" else f"{width}x{height}"
    with tempfile.TemporaryDirectory(prefix="mfctl-") as folder:
        clips, rejects = Path(folder, "clips.parquet"), Path(folder, "rejects.parquet")
        counts = _write_rows(unit, clips, rejects, config, encoders)
        rejected = sum(counts["rejects_by_reason"].values())
        check_token(store, token)
        files = [
            _publish(store, clips, "clips", f"clips/{unit.name}-{bucket}.parquet", counts["accepted"]),
            _publish(store, rejects, "rejects", f"rejects/{unit.name}.parquet", rejected),
        ]
    marker = {
        "unit": unit.name,
        "fingerprint": config.fingerprint,
        "files": [file for file in files if file],
        "sources": len(unit.sources),
        **counts,
    }
    check_token(store, token)
    store.write(unit.marker, canonical(marker).encode())
    return marker


def _write_rows(unit: Unit, clips: Path, rejects: Path, config: PreprocessConfig, encoders: Encoders) -> dict[str, Any]:
    """Run the unit's sources through the steps into two local files; what the marker says of their rows."""
    sums = {m: ChannelSums.zero(codec.channels) for m, codec in encoders.codecs.items()}
    seconds, reasons, whole_sources = 0.0, Counter[str](), 0
    with RowWriter(clips) as writer, RowWriter(rejects, REJECTS) as reject_writer:
        for source in unit.sources:
            for clip in process_source(source, config, encoders):
                if isinstance(clip, Rejected):
                    reject_writer.add(_reject_row(source, clip))
                    reasons[clip.reason] += 1
                    whole_sources += clip.span is None
                    continue
                writer.add(_row(clip, config, encoders))
                seconds += clip.span[1] - clip.span[0]
                for modality, latents in (clip.latents or {}).items():
                    sums[modality].add(latents, encoders.timeline.clocks[modality].head)
    return {
        "accepted": writer.rows,
        "rejects_by_reason": dict(sorted(reasons.items())),
        "rejected_sources": whole_sources,
        "seconds": round(seconds, 6),
        "sums": {m: s.to_json() for m, s in sums.items()},
    }


def _row(clip: Clip, config: PreprocessConfig, encoders: Encoders) -> dict[str, Any]:
    assert clip.latents is not None
    return to_row(
        clip,
        id=clip_id(clip),
        file_name=file_name(clip.source.uri),
        fps=float(config.fps),
        sample_rate=config.sample_rate,
        times=latent_times(clip.latents, encoders.timeline),
        dtype=config.latent_dtype,
    )


def _reject_row(source: Source, rejected: Rejected) -> dict[str, Any]:
    start, end = rejected.span or (None, None)
    # ffmpeg prints addresses of its contexts: they differ from run to run, a unit's bytes must not
    detail = re.sub(r" @ 0x[0-9a-f]+", "", rejected.detail.encode("utf-8", "replace").decode())[:500]
    return {
        "uri": source.uri,
        "span_start_sec": start,
        "span_end_sec": end,
        "step": rejected.step,
        "reason": rejected.reason,
        "detail": detail,
    }


def _publish(store: Store, local: Path, kind: str, name: str, rows: int) -> dict[str, Any] | None:
    """Put a file unless it has no rows; its entry in the marker."""
    if rows == 0:
        return None
    data = local.read_bytes()
    store.put(local, name)
    return {"kind": kind, "name": name, "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# ----------------------------------------------------------------------------------------------------------- all units


@cache
def _kept_encoders(config: PreprocessConfig) -> Encoders:
    """The encoders of a worker process: built once, used for all its units."""
    torch.set_num_threads(1)  # one worker per CPU
    return build_encoders(config)


def _work(row: dict[str, Any], store_uri: str, token: str, config: PreprocessConfig) -> dict[str, Any]:
    """A Ray task: one unit in, its marker out."""
    unit = Unit.from_json(row["unit"])
    return {"marker": canonical(run_unit(unit, Store(store_uri), token, config, _kept_encoders(config)))}


def run_units(
    units: Sequence[Unit], store: Store, token: str, config: PreprocessConfig, on_done: Callable[[dict[str, Any]], None]
) -> None:
    """Process all units through Ray Data, or in this process for ``workers=0``; ``on_done(marker)`` after each."""
    if config.workers == 0:
        encoders = build_encoders(config)
        for unit in units:
            on_done(run_unit(unit, store, token, config, encoders))
    elif units:
        _run_on_ray(units, store, token, config, on_done)


def _run_on_ray(
    units: Sequence[Unit], store: Store, token: str, config: PreprocessConfig, on_done: Callable[[dict[str, Any]], None]
) -> None:
    _start_ray()
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its narration is no news to our users
    workers = min(len(units), config.workers or int(ray.cluster_resources().get("CPU", 1)))
    # One block per unit as far as Ray's bookkeeping allows: a block is what a task takes and what is retried.
    data = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=min(len(units), 4096))
    work = partial(_work, store_uri=store.uri, token=token, config=config)
    for row in data.map(work, num_cpus=1, concurrency=workers).iter_rows():
        on_done(json.loads(row["marker"]))


def _start_ray() -> None:
    """A quiet Ray in this process, unless one runs already or RAY_ADDRESS names a cluster."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else ray.init leaves a token that a later head demands
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
