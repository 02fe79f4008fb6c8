"""Decode media with ffmpeg on one clock.

Streams are placed by the presentation timestamps of their *decoded* frames and samples. Headers are hints only: edit
lists, codec priming and broken muxers make them wrong. `MediaInfo.start` is the timestamp of the first decoded video
frame, or audio sample without video. It becomes frame 0 and sample 0 of the output. Output frame j is the source frame
nearest to ``start + j / fps``, so the error is at most half a source frame, also at variable rates. Late audio is
preceded by silence, early audio is cut, gaps above 5 ms are filled with silence, drifting audio is stretched.

Each child process runs without a shell or terminal, has a memory limit, ends with its parent and is killed after
``stall_seconds`` without output. A process killed from outside raises ``MediaError(killed)``; it is not an early end.
"""

import fcntl
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from types import TracebackType
from typing import IO, Any, Self

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from preprocessing.io.processes import limit_process
from preprocessing.media.ffmpeg_filters import audio_filters, scene_filters, video_filters
from preprocessing.media.mp4_writer import file_url
from preprocessing.media.probe import (
    DECODER_BYTES,
    INPUT_LIMITS,
    KILL_SIGNALS,
    STALL_SECONDS,
    MediaError,
    MediaInfo,
    probe,
)
from preprocessing.records import Frames, Waveform

SEEK_MARGIN = 10.0  # seconds decoded and dropped before a span, so that a coarse seek cannot land behind its start
_PIPE_BYTES = 1 << 20
_ERROR_BYTES = 1 << 20  # stderr that is kept
_TRAILING_AUDIO_BYTES = 1 << 24  # audio that is kept after the end of the video
_INPUT = "@input"  # placeholder for the file name: ffmpeg-python cannot hash names outside UTF-8


class _PipeBuffer:
    """Bytes of one pipe, read without copies. Views that `peek` returned are never overwritten."""

    def __init__(self) -> None:
        self._data = np.empty(_PIPE_BYTES, np.uint8)
        self._first = self._last = 0
        self.received = 0

    def __len__(self) -> int:
        return self._last - self._first

    def reserve(self, size: int) -> None:
        """Reserve contiguous room for `size` unread bytes."""
        if self._first + size > len(self._data):
            data = np.empty(max(size + _PIPE_BYTES, _PIPE_BYTES), np.uint8)
            data[: len(self)] = self._data[self._first : self._last]
            self._last = len(self)
            self._data, self._first = data, 0

    def receive(self, file: int) -> int:
        """Read available bytes; return their count, 0 at the end."""
        if self._last == len(self._data):
            self.reserve(len(self) + _PIPE_BYTES)
        count = os.readv(file, [self._data[self._last : self._last + _PIPE_BYTES].data])
        self._last += count
        self.received += count
        return count

    def peek(self, size: int) -> NDArray[np.uint8]:
        """Return up to `size` unread bytes; they remain unread."""
        return self._data[self._first : min(self._last, self._first + size)]

    def drop(self, size: int) -> None:
        """Count `size` bytes as read."""
        self._first = min(self._last, self._first + size)

    def truncate(self, size: int) -> None:
        """Discard the unread bytes after the first `size`."""
        self._last = min(self._last, self._first + size)


class Decoder:
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
            memory: Memory limit of ffmpeg in bytes.
            cut_score: Record `scene_changes` with a higher score, of 100; None: none.
        """
        self.fps, self.size = fps, size
        self.sample_rate = sample_rate
        self.video = info.video if streams[0] else None
        self.audio = info.audio if streams[1] else None
        if self.video is None and self.audio is None:
            raise MediaError("no_stream", "neither video nor audio to decode")
        first = self.video.start if self.video else self.audio.start if self.audio else 0.0
        self.start = first if start is None else max(first, start)
        self._stall, self._memory = stall_seconds, memory
        self._frame = 0  # frames read so far
        self._last_output = time.monotonic()  # when video or audio last arrived
        self._buffers = {name: _PipeBuffer() for name in ("video", "audio", "error", "scene")}
        self._cuts: list[int] = []
        self._spawn(path, info, fit, cut_score)

    def _spawn(self, path: str | os.PathLike[str], info: MediaInfo, fit: str, cut_score: float | None) -> None:
        (audio_read, audio_write), (scene_read, scene_write) = os.pipe(), os.pipe()
        seek = self.start - info.origin - SEEK_MARGIN
        coarse = {"ss": f"{seek:.3f}", "noaccurate_seek": None} if seek > 0 else {}
        source = ffmpeg.input(_INPUT, copyts=None, reinit_filter=0, threads=1, **INPUT_LIMITS, **coarse)
        outputs: list[Any] = []
        large = {"flush_packets": 0, "blocksize": _PIPE_BYTES}  # the default of 32 KiB per write is slow
        if self.video:
            chain = video_filters(self.video, fps=self.fps, size=self.size, fit=fit, start=self.start)
            if cut_score is not None:
                chain += "," + scene_filters(rf"pipe\:{scene_write}", cut_score)
            outputs.append(
                source[str(self.video.index)].output("pipe:1", format="rawvideo", vf=chain, threads=1, **large)
            )
        if self.audio:
            chain = audio_filters(self.sample_rate, self.start)
            outputs.append(
                source[str(self.audio.index)].output(f"pipe:{audio_write}", format="f32le", af=chain, **large)
            )
        flags = ("-hide_banner", "-nostdin", "-loglevel", "error", "-filter_threads", "1")
        command = ffmpeg.merge_outputs(*outputs).global_args(*flags).compile()
        self._process = subprocess.Popen(
            limit_process([file_url(path) if word == _INPUT else word for word in command], self._memory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(audio_write, scene_write),
            bufsize=0,
            start_new_session=True,  # Ctrl-C must not stop ffmpeg: the file would appear short
        )
        for write_end in (audio_write, scene_write):
            os.close(write_end)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        audio, scene = (os.fdopen(end, "rb", buffering=0) for end in (audio_read, scene_read))
        self._pipes: list[IO[bytes]] = [self._process.stdout, audio, self._process.stderr, scene]
        self._selector, self._open = selectors.DefaultSelector(), set(self._buffers)
        for name, pipe in zip(self._buffers, self._pipes, strict=True):
            self._selector.register(pipe, selectors.EVENT_READ, name)
        with suppress(OSError):  # above the system limit, the pipe keeps its size
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop ffmpeg and close its pipes."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()

    def failure(self) -> str | None:
        """Read to the end of the file. Return the error of ffmpeg, or None if it succeeded."""
        lines = self.stderr_lines()
        # with reinit_filter=0, ffmpeg drops the audio when its format changes: an error here
        changed = [line for line in lines if "on the fly is not supported" in line and "audio" in line]
        code = self._exit_code()
        if code in KILL_SIGNALS:
            raise MediaError("killed", f"ffmpeg was ended from outside with {KILL_SIGNALS[code].name}")
        if code == 0 and not changed:
            return None
        return (changed or lines or [f"ffmpeg ended with code {code}"])[-1]

    def stderr_lines(self) -> list[str]:
        """Read to the end of the file. Return the lines of stderr of ffmpeg."""
        self._last_output = time.monotonic()
        while self._open:
            self._pump()
            for name in ("video", "audio", "scene"):
                self._buffers[name].drop(len(self._buffers[name]))
        return _lines(self._buffers["error"])

    @property
    def end_seconds(self) -> float:
        """Return the seconds decoded so far of the longer stream."""
        height, width = self.size
        video = self._buffers["video"].received // (3 * height * width) / self.fps
        return max(float(video), self._buffers["audio"].received // 4 / self.sample_rate)

    def scene_changes(self) -> Sequence[int]:
        """Return the numbers of the frames peeked at so far that differ much from their predecessor."""
        while any(key.data == "scene" for key, _ in self._selector.select(0)):
            self._pump()
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
        self._last_output = time.monotonic()
        while any(len(self._buffers[name]) < size and name in self._open for name, size in wanted.items()):
            self._pump()
        if any(len(self._buffers[name]) < size for name, size in wanted.items()):
            self._check_end()

    def _check_end(self) -> None:
        """Raise MediaError(killed) after the end of a stream if ffmpeg was ended from outside.

        ffmpeg closes a stream when it is decoded; the end of its standard error marks its exit. Until then the other
        streams are read. ffmpeg is alive if one of them exceeds the size of a pipe.
        """
        pictures, sound = self._buffers["video"].received, len(self._buffers["audio"])
        while "error" in self._open and self._buffers["video"].received - pictures < 4 * _PIPE_BYTES:
            self._pump()
            self._buffers["audio"].truncate(sound + _TRAILING_AUDIO_BYTES)
        if "error" not in self._open and (code := self._exit_code()) in KILL_SIGNALS:
            raise MediaError("killed", f"ffmpeg was ended from outside with {KILL_SIGNALS[code].name}")

    def _exit_code(self) -> int:
        """Return the exit code of ffmpeg after it closed its streams."""
        try:
            return self._process.wait(self._stall)
        except subprocess.TimeoutExpired:
            self.close()
            raise MediaError("timeout", f"ffmpeg did not exit within {self._stall:.0f} s") from None

    def _pump(self) -> None:
        """Read the pipes into the buffers. Raise MediaError after `stall_seconds` without output."""
        ready = self._selector.select(max(0.0, self._last_output + self._stall - time.monotonic()))
        if not ready:
            self.close()
            raise MediaError("timeout", f"no output of ffmpeg for {self._stall:.0f} s")
        for key, _ in ready:
            if self._buffers[key.data].receive(key.fd) == 0:
                self._selector.unregister(key.fileobj)
                self._open.discard(key.data)
            elif key.data in ("video", "audio"):
                self._last_output = time.monotonic()
        self._buffers["error"].truncate(_ERROR_BYTES)


def _lines(buffer: _PipeBuffer) -> list[str]:
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
