"""Decode media with ffmpeg on one clock.

Streams are placed by the presentation timestamps of their *decoded* frames and samples. Headers are hints only: edit
lists, codec priming and broken muxers make them wrong. `MediaInfo.start` is the timestamp of the first decoded video
frame, or audio sample without video. It becomes frame 0 and sample 0 of the output. Output frame j is the source frame
nearest to ``start + j / fps``, so the error is at most half a source frame, also at variable rates. Late audio is
preceded by silence, early audio is cut, gaps above 5 ms are filled with silence, drifting audio is stretched.

One ffmpeg process decodes both streams. It closes the pipe of a stream at the end of the file only. If a stream ends
early, starts late or is stored apart from the other, the pictures or the audio in between would all have to be kept. A
second process then decodes the audio, so that each stream is read on demand.

Each child process runs without a shell or terminal, has a memory limit, ends with its parent and is killed after
``stall_seconds`` without output or ``wall_seconds`` in all. A process killed from outside raises
``MediaError(killed)``; it is not an early end.
"""

import fcntl
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from math import inf
from types import TracebackType
from typing import Any, Self

import ffmpeg
import numpy as np

from preprocessing.io.processes import limit_process
from preprocessing.media.ffmpeg_filters import audio_filters, gap_filter, scene_filters, video_filters
from preprocessing.media.mp4_writer import file_url
from preprocessing.media.pipe_buffer import PIPE_BYTES, PipeBuffer
from preprocessing.media.pipe_reader import STREAMS, PipeReader
from preprocessing.media.probe import (
    DECODER_BYTES,
    INPUT_LIMITS,
    STALL_SECONDS,
    MediaError,
    MediaInfo,
    probe,
)
from preprocessing.records import Frames, Waveform

SEEK_MARGIN = 10.0  # seconds decoded and dropped before a span, so that a coarse seek cannot land behind its start
MAX_SURPLUS_BYTES = 1 << 26  # of one stream beyond what is wanted, while the other one is awaited
GAP_SECONDS = 600.0  # longest time without a frame or sample; a longer one is a broken timestamp
_TRAILING_AUDIO_BYTES = 1 << 24  # audio that is kept after the end of the video
_ALL: dict[str, int] = dict.fromkeys(STREAMS, sys.maxsize)
_TIMESTAMP = re.compile(r"-?\d+\.\d{6}")  # line that the filters print at a gap
_INPUT = "@input"  # placeholder for the file name: ffmpeg-python cannot hash names outside UTF-8


class Decoder(PipeReader):
    """Decoder of both streams of a file in one ffmpeg process, in order and in whole frames.

    ``read(n)`` returns n frames and exactly their audio; fewer at the end. Sample boundaries are those of the frame
    grid, ``round(j sample_rate / fps)``, so consecutive reads have no gap or overlap. Without video the frame grid
    still applies and frames are None. ``peek_frames`` returns the same without reading.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        info: MediaInfo,
        *,
        fps: Fraction,
        size: tuple[int, int],
        sample_rate: int,
        streams: tuple[bool, bool] = (True, True),
        fit: str = "crop",
        start: float | None = None,
        stall_seconds: float = STALL_SECONDS,
        wall_seconds: float = inf,
        gap_seconds: float = GAP_SECONDS,
        memory: int = DECODER_BYTES,
        cut_score: float | None = None,
    ) -> None:
        """Start ffmpeg.

        Args:
            path: Local file.
            info: Result of `probe` for the file.
            fps: Frame rate of the output.
            size: Height and width of the output in pixels.
            sample_rate: Sample rate of the output in Hz.
            streams: Decode (video, audio).
            fit: Treatment of other aspect ratios, "crop" or "pad".
            start: Timestamp of output instant 0, not before the first frame; None: that of the first frame.
            stall_seconds: Timeout without output.
            wall_seconds: Time limit since the start of the decoder.
            gap_seconds: Longest time without a frame or sample; see `gap`.
            memory: Memory limit of ffmpeg in bytes.
            cut_score: Record `scene_changes` with a higher score, of 100; None: none.
        """
        super().__init__(stall_seconds, wall_seconds)
        self.fps, self.size = fps, size
        self.sample_rate = sample_rate
        self.video = info.video if streams[0] else None
        self.audio = info.audio if streams[1] else None
        if self.video is None and self.audio is None:
            raise MediaError("no_stream", "neither video nor audio to decode")
        first = self.video.start if self.video else self.audio.start if self.audio else 0.0
        self.start = first if start is None else max(first, start)
        self._path, self._info, self._fit = path, info, fit
        self._memory, self._gap = memory, gap_seconds
        self._cut_score = cut_score
        self._frame = 0  # frames read so far
        self._peeked = dict.fromkeys(_ALL, 0)  # bytes that were last peeked at
        self._cuts: list[int] = []
        self._process = self._start_process({"video": self.video is not None, "audio": self.audio is not None})

    def _start_process(self, decoded: Mapping[str, bool], *, error: str = "error") -> "subprocess.Popen[bytes]":
        """Start ffmpeg for some streams and register its pipes; `error` names that of its messages."""
        (audio_read, audio_write), (scene_read, scene_write) = os.pipe(), os.pipe()
        command = self._command(decoded, f"pipe:{audio_write}", rf"pipe\:{scene_write}")
        process = subprocess.Popen(
            limit_process(command, self._memory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(audio_write, scene_write),
            bufsize=0,
            start_new_session=True,  # Ctrl-C must not stop ffmpeg: the file would appear short
        )
        for write_end in (audio_write, scene_write):
            os.close(write_end)
        assert process.stdout is not None
        assert process.stderr is not None
        audio, scene = (os.fdopen(end, "rb", buffering=0) for end in (audio_read, scene_read))
        self.processes.append(process)
        self._pipes += [process.stdout, audio, process.stderr, scene]
        if decoded["video"]:
            self._register(process.stdout, "video")
            self._register(scene, "scene")
            with suppress(OSError):  # above the system limit, the pipe keeps its size
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        if decoded["audio"]:
            self._register(audio, "audio")
        self._register(process.stderr, error)
        return process

    def _command(self, decoded: Mapping[str, bool], audio_target: str, scene_target: str) -> list[str]:
        seek = self.start - self._info.origin - SEEK_MARGIN
        coarse = {"ss": f"{seek:.3f}", "noaccurate_seek": None} if seek > 0 else {}
        source = ffmpeg.input(_INPUT, copyts=None, reinit_filter=0, threads=1, **INPUT_LIMITS, **coarse)
        outputs: list[Any] = []
        large = {"flush_packets": 0, "blocksize": PIPE_BYTES}  # the default of 32 KiB per write is slow
        if decoded["video"] and self.video:
            chain = gap_filter("select", self._gap, self.start, report=True) + ","
            chain += video_filters(
                self.video, fps=self.fps, size=self.size, fit=self._fit, start=self.start, gap_seconds=self._gap
            )
            if self._cut_score is not None:
                chain += "," + scene_filters(scene_target, self._cut_score)
            outputs.append(
                source[str(self.video.index)].output("pipe:1", format="rawvideo", vf=chain, threads=1, **large)
            )
        if decoded["audio"] and self.audio:
            chain = gap_filter("aselect", self._gap, self.start, report=self.video is None) + ","
            chain += audio_filters(self.sample_rate, self.start)
            outputs.append(source[str(self.audio.index)].output(audio_target, format="f32le", af=chain, **large))
        flags = ("-hide_banner", "-nostdin", "-loglevel", "error", "-filter_threads", "1")
        command = ffmpeg.merge_outputs(*outputs).global_args(*flags).compile()
        return [file_url(self._path) if word == _INPUT else word for word in command]

    def _split(self) -> None:
        """Decode the audio in a second process from its start; discard that of the first process."""
        self._selector.modify(self._streams["audio"], selectors.EVENT_READ, "unused")
        self._open.add("unused")
        self._repeated = self._buffers["audio"].received
        self._start_process({"video": False, "audio": True}, error="audio_error")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def failure(self) -> str | None:
        """Read to the end of the file. Return the error of ffmpeg, or None if it succeeded."""
        lines = self.stderr_lines()
        # with reinit_filter=0, ffmpeg drops the audio when its format changes: an error here
        changed = [line for line in lines if "on the fly is not supported" in line and "audio" in line]
        codes = [self._exit_code(process) for process in self.processes]
        if codes[0] == 0 and not changed:
            return None
        return (changed or lines or [f"ffmpeg ended with code {codes[0]}"])[-1]

    def stderr_lines(self) -> list[str]:
        """Read to the end of the file. Return the lines of stderr of ffmpeg."""
        self._last_output = time.monotonic()
        while self._open:
            self._pump(_ALL)
            for name in ("video", "audio", "scene"):
                self._buffers[name].drop(len(self._buffers[name]))
        return [line for line in _lines(self._buffers["error"]) if not _TIMESTAMP.fullmatch(line)]

    @property
    def gap(self) -> float | None:
        """Return the timestamp after a gap of more than `gap_seconds` that ends the decoded part, in seconds.

        None without a gap, or if later timestamps continue before the gap. Complete at the end of the file only.
        """
        stamps = [float(line) for line in _lines(self._buffers["error"]) if _TIMESTAMP.fullmatch(line)]
        return stamps[-1] if stamps and stamps[-1] >= 0 else None

    @property
    def end_seconds(self) -> float:
        """Return the seconds decoded so far of the longer stream."""
        height, width = self.size
        video = self._buffers["video"].received // (3 * height * width) / self.fps
        return max(float(video), self._buffers["audio"].received // 4 / self.sample_rate)

    def scene_changes(self) -> Sequence[int]:
        """Return the numbers of the frames peeked at so far that differ much from their predecessor."""
        while any(key.data == "scene" for key, _ in self._selector.select(0)):
            self._pump(self._peeked)
        output = self._buffers["scene"].peek(len(self._buffers["scene"])).tobytes()
        complete = output[: output.rfind(b"\n") + 1]
        self._buffers["scene"].drop(len(complete))
        self._cuts += [int(line[6:].split()[0]) for line in complete.splitlines() if line.startswith(b"frame:")]
        return self._cuts

    def peek_audio(self, samples: int) -> Waveform:
        """Return the next `samples` of audio without reading them; fewer at the end."""
        self._fill({"audio": 4 * samples})
        sound = self._buffers["audio"].peek(4 * samples)
        return sound[: len(sound) // 4 * 4].view(np.float32)

    def peek_frames(self, frames: int) -> tuple[Frames | None, Waveform | None]:
        """Return what `read` would return, as lasting views. Raise MediaError on a timeout."""
        height, width = self.size
        frame_bytes = 3 * height * width
        first, last = self._sample(self._frame), self._sample(self._frame + frames)
        self._fill(
            {"video": frames * frame_bytes if self.video else 0, "audio": 4 * (last - first) if self.audio else 0}
        )
        if self.video:
            frames = min(frames, len(self._buffers["video"]) // frame_bytes)
        else:
            frames = min(frames, self._audio_frames(first))
        pictures, sound = None, None
        if self.video:
            pictures = self._buffers["video"].peek(frames * frame_bytes).reshape(frames, height, width, 3)
        if self.audio:
            samples = self._sample(self._frame + frames) - first
            sound = self.peek_audio(samples)
            sound = np.pad(sound, (0, samples - len(sound)))  # audio may end before the video
        return pictures, sound

    def skip(self, frames: int) -> None:
        """Count the next frames and their audio as read."""
        height, width = self.size
        samples = self._sample(self._frame + frames) - self._sample(self._frame)
        self.peek_frames(frames)
        self._buffers["video"].drop(frames * 3 * height * width)
        self._buffers["audio"].drop(4 * samples)
        self._frame += frames

    def read(self, frames: int) -> tuple[Frames | None, Waveform | None]:
        """Return the next frames and their audio; fewer at the end. Raise MediaError on a timeout."""
        pictures, sound = self.peek_frames(frames)
        if pictures is not None:
            self.skip(len(pictures))
        elif sound is not None:
            self.skip(min(frames, int((len(sound) + 1) * self.fps / self.sample_rate)))
        return pictures, sound

    def _sample(self, frame: int) -> int:
        return round(frame * self.sample_rate / self.fps)

    def _audio_frames(self, first: int) -> int:
        available = first + len(self._buffers["audio"]) // 4
        return int(available * self.fps / self.sample_rate) - self._frame

    def _fill(self, wanted: dict[str, int]) -> None:
        """Read pipes until the buffers have the wanted bytes or the streams have ended."""
        for name, size in wanted.items():
            self._buffers[name].reserve(size)
            self._peeked[name] = size
        self._last_output = time.monotonic()
        while missing := {name for name in self._lacking(wanted) if name in self._open}:
            self._pump(wanted)
            if missing and len(self.processes) == 1 and self._surplus() > MAX_SURPLUS_BYTES:
                self._split()
        if self._lacking(wanted):
            self._check_end()

    def _lacking(self, wanted: Mapping[str, int]) -> list[str]:
        return [name for name, size in wanted.items() if len(self._buffers[name]) < size]

    def _surplus(self) -> int:
        """Return the unread bytes of a stream beyond what was last peeked at, while both are decoded together."""
        if not {"video", "audio"} <= self._open:
            return 0
        return max(len(self._buffers[name]) - size for name, size in self._peeked.items())

    def _check_end(self) -> None:
        """Raise MediaError(killed) after the end of a stream if ffmpeg was ended from outside.

        ffmpeg closes a stream when it is decoded; the end of its standard error marks its exit. Until then the other
        streams are read. ffmpeg is alive if one of them exceeds the size of a pipe.
        """
        if len(self.processes) > 1:
            for name, error, process in zip(_ALL, ("error", "audio_error"), self.processes, strict=True):
                while name not in self._open and error in self._open:
                    self._pump({})
                if error not in self._open:
                    self._exit_code(process)
            return
        pictures, sound = self._buffers["video"].received, len(self._buffers["audio"])
        while "error" in self._open and self._buffers["video"].received - pictures < 4 * PIPE_BYTES:
            self._pump(_ALL)
            self._buffers["audio"].truncate(sound + _TRAILING_AUDIO_BYTES)
        if "error" not in self._open:
            self._exit_code(self._process)


def _lines(buffer: PipeBuffer) -> list[str]:
    return buffer.peek(len(buffer)).tobytes().decode("utf-8", "replace").strip().splitlines()


def decode_range(
    path: str | os.PathLike[str],
    start: float,
    end: float,
    *,
    fps: Fraction,
    size: tuple[int, int],
    sample_rate: int,
    fit: str = "crop",
) -> tuple[Frames | None, Waveform | None]:
    """Return frames and audio of [start, end) seconds after the origin of the file."""
    info = probe(path)
    with Decoder(
        path, info, fps=fps, size=size, sample_rate=sample_rate, fit=fit, start=info.origin + start
    ) as decoder:
        return decoder.read(round((end - start) * fps))
