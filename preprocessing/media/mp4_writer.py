"""Write H.264 + AAC mp4 files, as a whole or as a stream."""

import os
import subprocess
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import ffmpeg
import numpy as np

from mfcore.errors import UserInputError
from preprocessing.records import Frames, Waveform


def file_url(path: str | os.PathLike[str]) -> str:
    """Return a file name that ffmpeg does not parse as an option, protocol or pattern."""
    return "file:" + os.path.abspath(os.fspath(path))


class Mp4Writer:
    """Writer of an H.264 + AAC mp4 from chunks of frames and samples.

    The file appears under its name when it is complete. Video and audio both begin at 0. Frames are encoded on arrival.
    Samples are kept in a file next to the target and muxed at the end, so the streams are independent and memory is
    constant.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: Fraction | None = None,
        size: tuple[int, int] | None = None,
        sample_rate: int | None = None,
    ) -> None:
        """Open a writer: `fps` and `size` (even height, width) for video, `sample_rate` for audio."""
        if (fps is None) != (size is None) or (fps is None and sample_rate is None):
            raise UserInputError("an mp4 needs fps and size for video, sample_rate for audio, or all three")
        if size is not None and (size[0] % 2 or size[1] % 2):
            raise UserInputError(f"size {size[0]}x{size[1]}: H.264 needs an even height and width")
        self.path = Path(os.path.abspath(os.fspath(path)))
        self._fps, self._size = fps, size
        self._sample_rate = sample_rate
        stem = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self._video, self._sound, self._whole = (Path(f"{stem}.{part}") for part in ("video.mp4", "f32", "tmp.mp4"))
        self._encoder = self._start_encoder() if size is not None else None
        self._samples: IO[bytes] | None = self._sound.open("wb") if sample_rate is not None else None

    def _start_encoder(self) -> "subprocess.Popen[bytes]":
        assert self._size is not None
        assert self._fps is not None
        height, width = self._size
        raw = ffmpeg.input(
            "pipe:0", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", framerate=str(self._fps)
        )
        command = (
            raw.output(
                "@video",
                vf="scale=out_color_matrix=bt709:out_range=tv",
                vcodec="libx264",
                pix_fmt="yuv420p",
                crf=16,
                preset="veryfast",
                threads=1,  # for equal bytes on all machines
                colorspace="bt709",
                color_primaries="bt709",
                color_trc="bt709",
                color_range="tv",
            )
            .global_args("-hide_banner", "-loglevel", "error", "-y")
            .compile()
        )
        return subprocess.Popen(self._named(command), stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    def push_frames(self, frames: Frames) -> None:
        """Append uint8 ``(n, height, width, 3)`` frames."""
        assert self._encoder is not None, "this mp4 was opened without video"
        assert self._encoder.stdin is not None
        if frames.shape[1:] != (*(self._size or ()), 3) or frames.dtype != np.uint8:
            raise UserInputError(f"expected uint8 frames of {self._size}, got {frames.dtype} {frames.shape}")
        self._encoder.stdin.write(np.ascontiguousarray(frames).tobytes())

    def push_samples(self, samples: Waveform) -> None:
        """Append float samples in [-1, 1]; others are clipped."""
        assert self._samples is not None, "this mp4 was opened without audio"
        self._samples.write(np.clip(samples, -1, 1).astype(np.float32).tobytes())

    def close(self) -> None:
        """Finish the streams, mux them and rename the file."""
        if self._encoder is not None:
            _, stderr = self._encoder.communicate()
            self._check(self._encoder.returncode, stderr)
        if self._samples is not None:
            self._samples.close()
        done = subprocess.run(self._mux_command(), capture_output=True, check=False, stdin=subprocess.DEVNULL)
        self._check(done.returncode, done.stderr)
        os.replace(self._whole, self.path)
        self._clean()

    def _mux_command(self) -> list[str]:
        streams: list[Any] = []
        options: dict[str, Any] = {"movflags": "+faststart"}
        if self._encoder is not None:
            streams.append(ffmpeg.input("@video"))
            options["vcodec"] = "copy"
        if self._samples is not None:
            streams.append(ffmpeg.input("@sound", format="f32le", ar=self._sample_rate, ac=1))
            options |= {"acodec": "aac", "audio_bitrate": "128k"}
        merged = ffmpeg.output(*streams, "@whole", **options)
        return self._named(merged.global_args("-hide_banner", "-loglevel", "error", "-y").compile())

    def _named(self, command: list[str]) -> list[str]:
        """Replace placeholders by file names; ffmpeg-python cannot hash names outside UTF-8."""
        names = {"@video": self._video, "@sound": self._sound, "@whole": self._whole}
        return [file_url(names[word]) if word in names else word for word in command]

    def _check(self, code: int, stderr: bytes) -> None:
        if code != 0:
            self._clean()
            reason = stderr.decode("utf-8", "replace").strip() or f"ffmpeg ended with code {code}"
            raise RuntimeError(f"cannot write {self.path}: {reason}")

    def _clean(self) -> None:
        for path in (self._video, self._sound, self._whole):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        if self._encoder is not None:
            self._encoder.kill()
            self._encoder.communicate()
        if self._samples is not None:
            self._samples.close()
        self._clean()


def write_mp4(
    path: str | os.PathLike[str],
    frames: Frames | None,
    fps: Fraction | None,
    waveform: Waveform | None = None,
    *,
    sample_rate: int | None = None,
) -> None:
    """Write a clip: frames uint8 ``(n, height, width, 3)``, waveform float32 ``(samples,)``."""
    size = None if frames is None else (frames.shape[1], frames.shape[2])
    with Mp4Writer(path, fps=fps if size else None, size=size, sample_rate=sample_rate) as writer:
        if frames is not None:
            writer.push_frames(frames)
        if waveform is not None:
            writer.push_samples(waveform)
