"""Decode media with ffmpeg on one clock. (probe.py looks first, mp4.py writes; filtergraph.py says how.)

The clock. A file's streams are placed by the presentation timestamps of their *decoded* frames and samples; headers
are only hints (edit lists, codec priming and broken muxers make them lie). ``MediaInfo.start`` is the timestamp of the
first decoded video frame (or audio sample where there is no picture). Decoding puts instant ``start`` at frame 0 and
sample 0 of its output; output frame j shows the source frame whose timestamp is nearest to ``start + j / fps``, so it
is at most half a source frame off, also at variable rates. Sound that begins later is preceded by silence, earlier
sound is cut, gaps of more than 5 ms are filled with silence, and sound that drifts against its timestamps is stretched.

Every child process runs without a shell, reads no terminal and hears no signal of it, has a limit of memory, ends when
we end, and is killed when it produces nothing for ``stall_seconds``. One that is killed from outside says nothing about
the file: that is ``MediaError(killed)``, and never an early end.
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
from preprocessing.media.probe import DECODER_BYTES, KILL_SIGNALS, STALL_SECONDS, MediaError, MediaInfo, probe
from preprocessing.records import Frames, Waveform

SEEK_MARGIN = 10.0  # seconds decoded and dropped before a span, so that a coarse seek cannot land behind its start
_PIPE_BYTES = 1 << 20
_ERROR_BYTES = 1 << 20  # of complaints that are kept
_BEHIND_BYTES = 1 << 24  # of sound that are kept behind the end of the picture
_INPUT = "@input"  # stands for the file in a command being built: ffmpeg-python cannot hash names that are no UTF-8


class _Inbox:
    """Bytes of one pipe, read straight to where they stay: what ``take`` gave out is never written over."""

    def __init__(self) -> None:
        self._data = np.empty(_PIPE_BYTES, np.uint8)
        self._first = self._last = 0
        self.received = 0

    def __len__(self) -> int:
        return self._last - self._first

    def reserve(self, size: int) -> None:
        """Room for ``size`` unread bytes in one piece."""
        if self._first + size > len(self._data):
            data = np.empty(max(size + _PIPE_BYTES, _PIPE_BYTES), np.uint8)
            data[: len(self)] = self._data[self._first : self._last]
            self._data, self._first, self._last = data, 0, len(self)

    def receive(self, file: int) -> int:
        """Read what is there; 0 at the end."""
        if self._last == len(self._data):
            self.reserve(len(self) + _PIPE_BYTES)
        count = os.readv(file, [self._data[self._last : self._last + _PIPE_BYTES].data])
        self._last += count
        self.received += count
        return count

    def look(self, size: int) -> NDArray[np.uint8]:
        """Up to ``size`` unread bytes, which stay unread."""
        return self._data[self._first : min(self._last, self._first + size)]

    def drop(self, size: int) -> None:
        self._first = min(self._last, self._first + size)

    def keep(self, size: int) -> None:
        """Forget the unread bytes behind the first ``size``, which nobody looked at yet."""
        self._last = min(self._last, self._first + size)


class Decoder:
    """Both streams of a file from one ffmpeg process, in order, in portions of whole frames.

    ``read(n)`` gives n frames and exactly the sound of those n frames; fewer at the end. Sample boundaries are those of
    the frame grid, ``round(j sample_rate / fps)``, so portions join without gap or overlap. Without a picture the frame
    grid is still the ruler, and frames are None. ``peek`` does the same and leaves everything to be read again.
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
        """``streams``: (picture, sound) wanted. ``start``: timestamp of output instant 0, not before the first frame;
        None: the first frame's. ``memory``: bytes that ffmpeg may have. ``cut_score``: look for ``cuts`` with a higher
        score, of 100."""
        self.fps, self.size, self.sample_rate = fps, size, sample_rate
        self.video = info.video if streams[0] else None
        self.audio = info.audio if streams[1] else None
        if self.video is None and self.audio is None:
            raise MediaError("no_stream", "neither picture nor sound to decode")
        first = self.video.start if self.video else self.audio.start if self.audio else 0.0
        self.start = first if start is None else max(first, start)
        self._stall, self._memory = stall_seconds, memory
        self._frame = 0  # frames handed out so far
        self._heard_at = time.monotonic()  # when picture or sound last came
        self._inboxes = {name: _Inbox() for name in ("video", "audio", "error", "scene")}
        self._cuts: list[int] = []
        self._spawn(path, info, fit, cut_score)

    def _spawn(self, path: str | os.PathLike[str], info: MediaInfo, fit: str, cut_score: float | None) -> None:
        (audio_read, audio_write), (scene_read, scene_write) = os.pipe(), os.pipe()
        seek = self.start - info.origin - SEEK_MARGIN
        coarse = {"ss": f"{seek:.3f}", "noaccurate_seek": None} if seek > 0 else {}
        source = ffmpeg.input(_INPUT, copyts=None, reinit_filter=0, threads=1, **coarse)
        outputs: list[Any] = []
        large = {"flush_packets": 0, "blocksize": _PIPE_BYTES}  # a write, and a read of ours, per 32 KiB costs time
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
            start_new_session=True,  # Ctrl-C is for us: a decoder that it stopped would look like a short file
        )
        for ours in (audio_write, scene_write):
            os.close(ours)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        own = [os.fdopen(end, "rb", buffering=0) for end in (audio_read, scene_read)]
        self._pipes: list[IO[bytes]] = [self._process.stdout, own[0], self._process.stderr, own[1]]
        self._selector, self._open = selectors.DefaultSelector(), set(self._inboxes)
        for name, pipe in zip(self._inboxes, self._pipes, strict=True):
            self._selector.register(pipe, selectors.EVENT_READ, name)
        with suppress(OSError):  # a user over the limit of the system keeps the small pipe
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop ffmpeg, whatever it is doing, and collect it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()

    def failure(self) -> str | None:
        """Read to the end of the file: what ffmpeg said if it failed on the way, else None."""
        said = self.stderr_lines()
        # with reinit_filter=0 ffmpeg goes on without the sound when its format changes: that is a failure here
        changed = [line for line in said if "on the fly is not supported" in line and "audio" in line]
        code = self._exit_code()
        if code in KILL_SIGNALS:
            raise MediaError("killed", f"something ended ffmpeg with {KILL_SIGNALS[code].name}")
        if code == 0 and not changed:
            return None
        return (changed or said or [f"ffmpeg ended with code {code}"])[-1]

    def stderr_lines(self) -> list[str]:
        """Read to the end of the file: every line that ffmpeg said, whether it failed or went on."""
        self._heard_at = time.monotonic()
        while self._open:
            self._pump()
            for name in ("video", "audio", "scene"):
                self._inboxes[name].drop(len(self._inboxes[name]))
        return _lines(self._inboxes["error"])

    @property
    def end_seconds(self) -> float:
        """Seconds from output instant 0 to where the longer stream is decoded so far."""
        height, width = self.size
        seen = self._inboxes["video"].received // (3 * height * width) / self.fps
        return max(float(seen), self._inboxes["audio"].received // 4 / self.sample_rate)

    def scene_changes(self) -> Sequence[int]:
        """Numbers of the frames, from 0 on, that differ much from the one before; all among those peeked at so far."""
        while any(key.data == "scene" for key, _ in self._selector.select(0)):
            self._pump()
        said = self._inboxes["scene"].look(len(self._inboxes["scene"])).tobytes()
        whole = said[: said.rfind(b"\n") + 1]
        self._inboxes["scene"].drop(len(whole))
        self._cuts += [int(line[6:].split()[0]) for line in whole.splitlines() if line.startswith(b"frame:")]
        return self._cuts

    def peek_audio(self, samples: int) -> Waveform:
        """The next ``samples`` of sound, which stay to be read; fewer at the end of the sound."""
        self._fill({"audio": 4 * samples})
        sound = self._inboxes["audio"].look(4 * samples)
        return sound[: len(sound) // 4 * 4].view(np.float32)

    def peek_frames(self, frames: int) -> tuple[Frames | None, Waveform | None]:
        """What ``read`` would give: views of memory that stays as it is. MediaError(timeout) on a stall."""
        height, width = self.size
        frame_bytes = 3 * height * width
        first, last = self._sample(self._frame), self._sample(self._frame + frames)
        self._fill(
            {"video": frames * frame_bytes if self.video else 0, "audio": 4 * (last - first) if self.audio else 0}
        )
        if self.video:
            frames = min(frames, len(self._inboxes["video"]) // frame_bytes)
        else:
            frames = min(frames, self._frames_heard(first))
        picture, sound = None, None
        if self.video:
            picture = self._inboxes["video"].look(frames * frame_bytes).reshape(frames, height, width, 3)
        if self.audio:
            samples = self._sample(self._frame + frames) - first
            sound = self.peek_audio(samples)
            sound = np.pad(sound, (0, samples - len(sound)))  # sound that ends before the picture
        return picture, sound

    def skip(self, frames: int) -> None:
        """Count the next frames and their sound as read."""
        height, width = self.size
        samples = self._sample(self._frame + frames) - self._sample(self._frame)
        self.peek_frames(frames)
        self._inboxes["video"].drop(frames * 3 * height * width)
        self._inboxes["audio"].drop(4 * samples)
        self._frame += frames

    def read(self, frames: int) -> tuple[Frames | None, Waveform | None]:
        """The next frames and their sound; fewer at the end of the file. MediaError(timeout) on a stall."""
        picture, sound = self.peek_frames(frames)
        if picture is not None:
            self.skip(len(picture))
        elif sound is not None:
            self.skip(min(frames, int((len(sound) + 1) * self.fps / self.sample_rate)))
        return picture, sound

    def _sample(self, frame: int) -> int:
        return round(frame * self.sample_rate / self.fps)

    def _frames_heard(self, first: int) -> int:
        available = first + len(self._inboxes["audio"]) // 4
        return int(available * self.fps / self.sample_rate) - self._frame

    def _fill(self, wanted: dict[str, int]) -> None:
        """Read pipes until the inboxes hold what is wanted or the streams have ended."""
        for name, size in wanted.items():
            self._inboxes[name].reserve(size)
        self._heard_at = time.monotonic()
        while any(len(self._inboxes[name]) < size and name in self._open for name, size in wanted.items()):
            self._pump()
        if any(len(self._inboxes[name]) < size for name, size in wanted.items()):
            self._check_end()

    def _check_end(self) -> None:
        """Behind the end of a stream: MediaError(killed) unless ffmpeg ended by itself.

        It closes a stream when it has decoded everything, and what says that it has exited is its standard error. Until
        then the other streams are read; where one of them goes on for longer than a pipe holds, it lives.
        """
        pictures, sound = self._inboxes["video"].received, len(self._inboxes["audio"])
        while "error" in self._open and self._inboxes["video"].received - pictures < 4 * _PIPE_BYTES:
            self._pump()
            self._inboxes["audio"].keep(sound + _BEHIND_BYTES)
        if "error" not in self._open and (code := self._exit_code()) in KILL_SIGNALS:
            raise MediaError("killed", f"something ended ffmpeg with {KILL_SIGNALS[code].name}")

    def _exit_code(self) -> int:
        """Of ffmpeg, which has closed its streams."""
        try:
            return self._process.wait(self._stall)
        except subprocess.TimeoutExpired:
            self.close()
            raise MediaError("timeout", f"ffmpeg did not end within {self._stall:.0f} s") from None

    def _pump(self) -> None:
        """Move what is in the pipes into the inboxes; waits until ``stall_seconds`` after picture or sound came."""
        ready = self._selector.select(max(0.0, self._heard_at + self._stall - time.monotonic()))
        if not ready:
            self.close()
            raise MediaError("timeout", f"ffmpeg gave nothing for {self._stall:.0f} s")
        for key, _ in ready:
            if self._inboxes[key.data].receive(key.fd) == 0:
                self._selector.unregister(key.fileobj)
                self._open.discard(key.data)
            elif key.data in ("video", "audio"):
                self._heard_at = time.monotonic()
        self._inboxes["error"].keep(_ERROR_BYTES)


def _lines(inbox: _Inbox) -> list[str]:
    return inbox.look(len(inbox)).tobytes().decode("utf-8", "replace").strip().splitlines()


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
    """Frames and sound of [start, end) seconds after the file's origin, on one clock (see the top of this file)."""
    info = probe(path)
    with Decoder(
        path, info, fps=fps, size=size, sample_rate=sample_rate, fit=fit, start=info.origin + start
    ) as decoder:
        return decoder.read(round((end - start) * fps))
