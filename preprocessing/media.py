"""Decode media with ffmpeg on one clock. (probe.py looks first, mp4.py writes; the three are all that talks to ffmpeg.)

The clock. A file's streams are placed by the presentation timestamps of their *decoded* frames and samples; headers
are only hints (edit lists, codec priming and broken muxers make them lie). ``MediaInfo.start`` is the timestamp of the
first decoded video frame (or audio sample where there is no picture). Decoding puts instant ``start`` at frame 0 and
sample 0 of its output; output frame j shows the source frame whose timestamp is nearest to ``start + j / fps``, so it
is at most half a source frame off, also at variable rates. Sound that begins later is preceded by silence, earlier
sound is cut, gaps of more than 5 ms are filled with silence.

Every child process runs without a shell, reads no terminal, and is killed when it produces nothing for
``stall_seconds``.
"""

import os
import selectors
import subprocess
from collections import Counter
from fractions import Fraction
from functools import cache
from types import TracebackType
from typing import IO, Any, Self

import ffmpeg
import numpy as np
from numpy.typing import NDArray

from preprocessing.mp4 import Frames, Waveform, file_url
from preprocessing.probe import STALL_SECONDS, MediaError, MediaInfo, VideoInfo, probe

HDR_TRANSFERS = ("smpte2084", "arib-std-b67")
SEEK_MARGIN = 10.0  # seconds decoded and dropped before a span, so that a coarse seek cannot land behind its start
_PIPE_BYTES = 1 << 20
_INPUT = "@input"  # stands for the file in a command being built: ffmpeg-python cannot hash names that are no UTF-8


@cache
def has_filter(name: str) -> bool:
    """Whether the installed ffmpeg was built with a filter."""
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    return any(line.split()[1:2] == [name] for line in listed.stdout.splitlines())


def _video_filters(info: VideoInfo, fps: Fraction, size: tuple[int, int], fit: str, start: float) -> str:
    """Nearest source frame per output instant, upright, square pixels, 8 bits, exactly ``size`` = (height, width)."""
    height, width = size
    within = "max" if fit == "crop" else "min"
    matrix = ":in_color_matrix=bt709" if not info.matrix and info.height >= 720 else ""
    scale = f"scale=w='round({within}({width},{height}*dar))':h='round({within}({height},{width}/dar))'{matrix}"
    fill = f"crop={width}:{height}" if fit == "crop" else f"pad={width}:{height}:-1:-1"
    return ",".join(
        [
            *(["yadif=deint=interlaced"] if info.interlaced else []),
            # A frame takes over half way between its predecessor's timestamp and its own; round=up then holds it.
            "settb=1/1000000",
            f"setpts='if(isnan(PREV_INPTS),PTS,(PTS+PREV_INPTS)/2)-{start:.6f}/TB'",
            f"fps=fps={fps}:start_time=0:round=up",
            f"{scale}:flags=area" if info.width > 2 * width else f"{scale}:flags=bicubic",
            *(_tone_map(info) if info.transfer in HDR_TRANSFERS else []),
            fill,
            "setsar=1",
            "format=rgb24",
        ]
    )


def _tone_map(info: VideoInfo) -> list[str]:
    """High dynamic range to bt709, white at 203 nits (ITU-R BT.2408)."""
    if not has_filter("zscale"):
        raise MediaError("hdr", "this ffmpeg has no zscale filter (libzimg) to turn HDR into SDR")
    source = f"tin={info.transfer}:min=bt2020nc:pin=bt2020:rin=limited"
    return [
        f"zscale={source}:t=linear:npl=203",
        "format=gbrpf32le",
        "zscale=p=bt709",
        "tonemap=hable:desat=0",
        "zscale=t=bt709:m=bt709:r=limited",
        "format=yuv420p",
    ]


def _audio_filters(sample_rate: int, start: float) -> str:
    return (
        f"asetpts='PTS-{start:.6f}/TB',aresample=async=1:first_pts=0:min_comp=0.0001:min_hard_comp=0.005,"
        f"aformat=sample_fmts=flt:sample_rates={sample_rate}:channel_layouts=mono"
    )


class Decoder:
    """Both streams of a file from one ffmpeg process, in order, in portions of whole frames.

    ``read(n)`` gives n frames and exactly the sound of those n frames; fewer at the end. Sample boundaries are those of
    the frame grid, ``round(j sample_rate / fps)``, so portions join without gap or overlap. Without a picture the frame
    grid is still the ruler, and frames are None.
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
    ) -> None:
        """``streams``: (picture, sound) wanted. ``start``: timestamp of output instant 0, else the first frame's."""
        self.fps, self.size, self.sample_rate = fps, size, sample_rate
        self.video = info.video if streams[0] else None
        self.audio = info.audio if streams[1] else None
        if self.video is None and self.audio is None:
            raise MediaError("no_stream", "neither picture nor sound to decode")
        first = self.video.start if self.video else self.audio.start if self.audio else 0.0
        self.start = first if start is None else start
        self._stall = stall_seconds
        self._frame = 0  # frames handed out so far
        self._buffers: dict[str, bytearray] = {"video": bytearray(), "audio": bytearray(), "error": bytearray()}
        self._received = Counter[str]()  # bytes per pipe so far
        self._spawn(path, info, fit)

    def _spawn(self, path: str | os.PathLike[str], info: MediaInfo, fit: str) -> None:
        read_end, write_end = os.pipe()
        seek = self.start - info.origin - SEEK_MARGIN
        coarse = {"ss": f"{seek:.3f}", "noaccurate_seek": None} if seek > 0 else {}
        source = ffmpeg.input(_INPUT, copyts=None, reinit_filter=0, threads=1, **coarse)
        outputs: list[Any] = []
        if self.video:
            chain = _video_filters(self.video, self.fps, self.size, fit, self.start)
            outputs.append(source[str(self.video.index)].output("pipe:1", format="rawvideo", vf=chain, threads=1))
        if self.audio:
            chain = _audio_filters(self.sample_rate, self.start)
            outputs.append(source[str(self.audio.index)].output(f"pipe:{write_end}", format="f32le", af=chain))
        command = ffmpeg.merge_outputs(*outputs).global_args("-hide_banner", "-nostdin", "-loglevel", "error").compile()
        self._process = subprocess.Popen(
            [file_url(path) if word == _INPUT else word for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(write_end,),
            bufsize=0,
        )
        os.close(write_end)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._audio_pipe: IO[bytes] = os.fdopen(read_end, "rb", buffering=0)
        self._selector = selectors.DefaultSelector()
        for name, pipe in (
            ("video", self._process.stdout),
            ("audio", self._audio_pipe),
            ("error", self._process.stderr),
        ):
            self._selector.register(pipe, selectors.EVENT_READ, name)

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
        for pipe in (self._process.stdout, self._process.stderr, self._audio_pipe):
            if pipe is not None:
                pipe.close()

    def error(self) -> str | None:
        """Read to the end of the file: what ffmpeg said if it failed on the way, else None."""
        said = self.complaints()
        # with reinit_filter=0 ffmpeg goes on without the sound when its format changes: that is a failure here
        changed = [line for line in said if "on the fly is not supported" in line and "audio" in line]
        if self._process.wait() == 0 and not changed:
            return None
        return (changed or said or [f"ffmpeg ended with code {self._process.returncode}"])[-1]

    def complaints(self) -> list[str]:
        """Read to the end of the file: every line that ffmpeg said, whether it failed or went on."""
        while self._selector.get_map():
            self._pump()
            self._buffers["video"].clear()
            self._buffers["audio"].clear()
        return self._buffers["error"].decode("utf-8", "replace").strip().splitlines()

    @property
    def end(self) -> float:
        """Seconds from output instant 0 to where the longer stream is decoded so far."""
        height, width = self.size
        seen = self._received["video"] // (3 * height * width) / self.fps
        return max(float(seen), self._received["audio"] // 4 / self.sample_rate)

    def ahead(self, samples: int) -> Waveform:
        """The next ``samples`` of sound, which stay to be read; fewer at the end of the sound."""
        self._fill({"audio": 4 * samples})
        size = min(samples, len(self._buffers["audio"]) // 4) * 4
        return np.frombuffer(bytes(memoryview(self._buffers["audio"])[:size]), dtype=np.float32)

    def read(self, frames: int) -> tuple[Frames | None, Waveform | None]:
        """The next frames and their sound; fewer at the end of the file. MediaError(timeout) on a stall."""
        height, width = self.size
        frame_bytes = 3 * height * width
        first, last = self._sample(self._frame), self._sample(self._frame + frames)
        self._fill(
            {"video": frames * frame_bytes if self.video else 0, "audio": 4 * (last - first) if self.audio else 0}
        )
        if self.video:
            frames = min(frames, len(self._buffers["video"]) // frame_bytes)
        else:
            frames = min(frames, self._frames_heard(first))
        self._frame += frames
        picture, sound = None, None
        if self.video:
            picture = self._take("video", frames * frame_bytes, np.uint8).reshape(frames, height, width, 3)
        if self.audio:
            samples = self._sample(self._frame) - first
            sound = self._take("audio", 4 * samples, np.float32)
            sound = np.pad(sound, (0, samples - len(sound)))  # sound that ends before the picture
        return picture, sound

    def _sample(self, frame: int) -> int:
        return round(frame * self.sample_rate / self.fps)

    def _frames_heard(self, first: int) -> int:
        available = first + len(self._buffers["audio"]) // 4
        return int(available * self.fps / self.sample_rate) - self._frame

    def _take(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """Remove up to ``size`` bytes from a buffer, whole items only."""
        buffer = self._buffers[name]
        size = min(size, len(buffer)) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
        taken = np.frombuffer(bytes(memoryview(buffer)[:size]), dtype=dtype)
        del buffer[:size]
        return taken

    def _fill(self, wanted: dict[str, int]) -> None:
        """Read pipes until the buffers hold what is wanted or the streams have ended."""
        while self._selector.get_map() and any(
            len(self._buffers[name]) < size and name in self._open() for name, size in wanted.items()
        ):
            self._pump()

    def _pump(self) -> None:
        """Move what is in the pipes into the buffers; waits for at most ``stall_seconds``."""
        ready = self._selector.select(self._stall)
        if not ready:
            self.close()
            raise MediaError("timeout", f"ffmpeg gave nothing for {self._stall:.0f} s")
        for key, _ in ready:
            data = os.read(key.fd, _PIPE_BYTES)
            self._buffers[key.data] += data
            self._received[key.data] += len(data)
            if not data:
                self._selector.unregister(key.fileobj)

    def _open(self) -> set[str]:
        return {key.data for key in self._selector.get_map().values()}


def decode(
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
