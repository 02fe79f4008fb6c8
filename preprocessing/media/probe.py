"""Probe media with ffprobe: streams and the timestamps of their first decoded frames."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preprocessing.io.errors import InfrastructureError
from preprocessing.io.processes import limit_process
from preprocessing.media.mp4_writer import file_url

STALL_SECONDS = 60.0
DECODER_BYTES = 4 << 30  # memory of ffmpeg: 16 reference frames of 8K in 10 bits, and HDR
# Exit codes of ffmpeg after a signal from outside; it turns SIGTERM into 255.
KILL_SIGNALS = {-signal.SIGKILL: signal.SIGKILL, -signal.SIGTERM: signal.SIGTERM, 255: signal.SIGTERM}
# Demuxers of the accepted suffixes. Others open the files that a text names (hls, dash, concat, sdp).
_DEMUXERS = "mov,matroska,avi,flv,mpegts,mpeg,mpegvideo,m4v,asf,ogg,wav,flac,mp3,aac"
INPUT_LIMITS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
"""Options of ffmpeg and ffprobe for an input: accepted demuxers, no protocol but local files."""
_NO_MEMORY = ("Cannot allocate memory", "get_buffer() failed")


class MediaError(ValueError):
    """A file cannot be probed or decoded: `reason` is a stable word, `detail` a message."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Properties of a video stream."""

    index: int  # stream number in the file
    width: int  # coded pixels, before rotation and pixel aspect
    height: int
    pixel_aspect: float = 1.0  # width / height of a pixel, before rotation
    rotation: int = 0  # degrees, multiple of 90; ffmpeg applies it when decoding
    fps: float  # average rate in the header; 0: unknown
    start: float  # timestamp of the first decoded frame, seconds
    transfer: str  # color transfer, e.g. bt709 or smpte2084
    matrix: str  # color matrix; "": unknown
    interlaced: bool

    @property
    def display_size(self) -> tuple[float, float]:
        """Return the displayed (height, width), after rotation and with square pixels."""
        height, width = float(self.height), self.width * self.pixel_aspect
        return (width, height) if self.rotation % 180 else (height, width)


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """Properties of an audio stream."""

    index: int  # stream number in the file
    sample_rate: int
    channels: int
    start: float  # timestamp of the first decoded sample, seconds; nan: none in the first packets


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """Streams of a file. Timestamps are those of the container; players show `origin` as 0."""

    video: VideoInfo | None
    audio: AudioInfo | None
    origin: float
    duration: float  # seconds in the header; 0: unknown

    @property
    def start(self) -> float:
        """Return the timestamp of the first decoded frame, or of the first sample without video."""
        if self.video is not None:
            return self.video.start
        assert self.audio is not None, "a probed file has a stream"
        return self.audio.start


def is_out_of_memory(lines: Sequence[str]) -> bool:
    """Return True if the stderr of ffmpeg reports a lack of memory."""
    return any(text in line for line in lines for text in _NO_MEMORY)


def _ffprobe(path: str | os.PathLike[str], packets: str, timeout: float, memory: int) -> dict[str, Any]:
    wanted = (
        "format=start_time,duration:stream=index,codec_type,codec_name,width,height,avg_frame_rate,sample_rate,channels,"
        "color_transfer,color_space,field_order,sample_aspect_ratio:stream_disposition=default,attached_pic:"
        "stream_side_data=rotation:stream_tags=rotate:"
        "frame=stream_index,best_effort_timestamp_time,pts_time,interlaced_frame"
    )
    command = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", wanted, "-show_frames"]
    command += [word for name, value in INPUT_LIMITS.items() for word in (f"-{name}", value)]
    command += ["-read_intervals", packets, "-i", file_url(path)]
    try:
        done = subprocess.run(
            limit_process(command, memory),
            capture_output=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise MediaError("timeout", f"ffprobe did not finish within {timeout:.0f} s") from None
    if done.returncode in KILL_SIGNALS:
        raise MediaError("killed", f"ffprobe was ended from outside with {KILL_SIGNALS[done.returncode].name}")
    errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if is_out_of_memory(errors):
        raise MediaError("memory", f"its first frames need more than {memory >> 20} MiB to decode")
    facts: dict[str, Any] = json.loads(done.stdout or b"{}")
    if not facts.get("streams"):
        raise MediaError("unreadable", _unreadable(errors))
    if 0 < len(facts.get("frames", [])) < 2 * len(errors):  # encrypted or damaged: an error for every other frame
        raise MediaError(
            "corrupt", f"{len(errors)} decoding errors in {len(facts['frames'])} frames: {errors[-1][-100:]}"
        )
    return facts


def _unreadable(errors: Sequence[str]) -> str:
    """Return why ffprobe found no streams."""
    for line in errors:
        if refused := re.match(r"\[(\w+)[, @].*\] Format not on whitelist", line):
            return f"the content has the format {refused[1]}, which is not accepted"
    return errors[-1].split(": ")[-1] if errors else "no streams"


def _first_times(facts: dict[str, Any]) -> dict[int, float]:
    """Return the timestamp of the first decoded frame or block of samples by stream number."""
    first: dict[int, float] = {}
    for frame in facts.get("frames", []):
        stamp = frame.get("best_effort_timestamp_time", frame.get("pts_time"))
        if stamp is not None and "stream_index" in frame:
            first.setdefault(int(frame["stream_index"]), float(stamp))
    return first


def _choose(streams: list[dict[str, Any]], kind: str, track: int | None = None) -> dict[str, Any] | None:
    """Return the default stream of a kind, else the first; skip cover images, unknown codecs.

    With `track`, return the stream of this number among those of its kind, from 0, if it is usable.
    """
    if track is not None:
        streams = [s for s in streams if s.get("codec_type") == kind][track : track + 1]
    usable = [
        s
        for s in streams
        if s.get("codec_type") == kind
        and s.get("codec_name", "unknown") not in ("unknown", "none")
        and not s.get("disposition", {}).get("attached_pic")
        and (kind == "audio" or int(s.get("width", 0)) > 0)
        and (kind == "video" or int(s.get("sample_rate", 0)) > 0)
    ]
    return max(usable, key=lambda s: s.get("disposition", {}).get("default", 0), default=None)


def _rate(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator) if float(denominator or 1) else 0.0


def probe(
    path: str | os.PathLike[str],
    *,
    timeout: float = STALL_SECONDS,
    memory: int = DECODER_BYTES,
    audio_track: int | None = None,
) -> MediaInfo:
    """Return the streams of a file from its header and its first decoded frames.

    Args:
        path: Local file.
        timeout: Seconds for ffprobe.
        memory: Memory limit of ffprobe in bytes.
        audio_track: Number of the audio stream, from 0; None: the default stream.

    Raises:
        MediaError: `reason` is ``unreadable`` (not media, truncated, empty), ``corrupt`` (damaged or encrypted start),
            ``timeout``, ``memory`` or ``killed`` (from outside).
        InfrastructureError: ffmpeg is not installed.
    """
    if shutil.which("ffprobe") is None:
        raise InfrastructureError("ffprobe is not installed: install ffmpeg. Run `mfctl doctor` for the command")
    if not os.path.isfile(path):
        raise MediaError("unreadable", "not a regular file" if os.path.exists(path) else "no such file")
    facts = _ffprobe(path, "%+#64", timeout, memory)
    first = _first_times(facts)
    video, audio = _choose(facts["streams"], "video"), _choose(facts["streams"], "audio", audio_track)
    if any(s is not None and s["index"] not in first for s in (video, audio)):
        # A stream begins late, or an edit list discards the first packets of the video.
        first = _first_times(_ffprobe(path, "%+30", timeout, memory)) | first
    start = float(facts.get("format", {}).get("start_time", 0.0))
    return MediaInfo(
        video=_video_info(video, first, any(frame.get("interlaced_frame") for frame in facts.get("frames", []))),
        audio=_audio_info(audio, first),
        origin=max(0.0, start),
        duration=float(facts.get("format", {}).get("duration", 0.0)),
    )


def _video_info(stream: dict[str, Any] | None, first: dict[int, float], interlaced: bool) -> VideoInfo | None:
    """Return the properties of a video stream; `interlaced`: as found in decoded frames."""
    if stream is None or stream["index"] not in first:
        return None
    return VideoInfo(
        index=stream["index"],
        width=int(stream["width"]),
        height=int(stream["height"]),
        pixel_aspect=_rate(stream.get("sample_aspect_ratio", "1:1").replace(":", "/")) or 1.0,
        rotation=_rotation(stream),
        fps=_rate(stream.get("avg_frame_rate", "0/1")),
        start=first[stream["index"]],
        transfer=stream.get("color_transfer", ""),
        matrix=stream.get("color_space", "").replace("unknown", ""),
        interlaced=interlaced or stream.get("field_order", "progressive") in ("tt", "bb", "tb", "bt"),
    )


def _rotation(stream: dict[str, Any]) -> int:
    """Return the rotation in degrees: side data in new versions of ffprobe, a tag in old ones."""
    rotations = [data["rotation"] for data in stream.get("side_data_list", []) if "rotation" in data]
    return round(float((rotations or [stream.get("tags", {}).get("rotate", 0)])[0]))


def _audio_info(stream: dict[str, Any] | None, first: dict[int, float]) -> AudioInfo | None:
    if stream is None or stream["index"] not in first:
        return None
    return AudioInfo(
        index=stream["index"],
        sample_rate=int(stream["sample_rate"]),
        channels=int(stream.get("channels", 1)),
        start=first[stream["index"]],
    )
