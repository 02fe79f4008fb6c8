"""Media files with a known clock: frames contain their number, a patch flashes at each beep.

The video is a static texture with 16 squares for the frame number in binary, and the patch. The audio is a quiet tone
with bursts of 1 kHz.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

SIDE, SQUARE = 128, 16
RATE = 44100
BEEPS = np.array([0.5, 1.1, 1.75, 2.3])  # seconds on the sound's own clock
BURST = 0.04  # seconds
PATCH = slice(72, 120)  # rows and columns of the patch that flashes


def numbered_frames(count: int, flashes: np.ndarray | None = None) -> np.ndarray:
    """Return uint8 ``(count, SIDE, SIDE, 3)``; frame i shows i in its two upper rows of squares.

    The patch is bright in the frames of `flashes` and the two after each.
    """
    texture = np.random.default_rng(0).integers(60, 130, (SIDE // 8, SIDE // 8, 3))
    frames = np.repeat(np.kron(texture, np.ones((8, 8, 1)))[None], count, 0).astype(np.uint8)
    for i in range(count):
        for bit in range(16):
            y, x = bit // 8 * SQUARE, bit % 8 * SQUARE
            frames[i, y : y + SQUARE, x : x + SQUARE] = 235 if i >> bit & 1 else 20
    for first in [] if flashes is None else flashes:
        frames[first : first + 3, PATCH, PATCH] = 235
    return frames


def read_numbers(frames: np.ndarray) -> np.ndarray:
    """Return the number in each decoded frame, of any size."""
    high, wide = (edge * SQUARE // SIDE for edge in frames.shape[1:3])
    gray = frames.astype(float).mean(3)
    numbers = np.zeros(len(frames), int)
    for bit in range(16):
        y, x = bit // 8 * high, bit % 8 * wide
        middle = gray[:, y + high // 4 : y + high - high // 4, x + wide // 4 : x + wide - wide // 4].mean((1, 2))
        numbers |= (middle > 127).astype(int) << bit
    return numbers


def find_flashes(frames: np.ndarray) -> np.ndarray:
    """Return the numbers of the frames with a new flash."""
    rows, columns = (slice(PATCH.start * n // SIDE, PATCH.stop * n // SIDE) for n in frames.shape[1:3])
    bright = frames[:, rows, columns].mean((1, 2, 3)) > 165
    return np.flatnonzero(bright[1:] & ~bright[:-1]) + 1


def burst(rate: int) -> np.ndarray:
    t = np.arange(round(BURST * rate)) / rate
    return np.sin(2 * np.pi * 1000 * t) * np.sin(np.pi * t / BURST) ** 2


def sound(seconds: float, rate: int = RATE, beeps: np.ndarray = BEEPS) -> np.ndarray:
    """Return a quiet tone with a burst from each beep time on."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.01 * np.sin(2 * np.pi * 220 * t)
    for beep in beeps:
        late = round(beep * rate)
        shape = burst(rate)[: max(0, len(wave) - late)]
        wave[late : late + len(shape)] += 0.6 * shape
    return wave.astype(np.float32)


def find_beeps(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the start times of the bursts in seconds, by matched filter."""
    t = np.arange(round(BURST * rate)) / rate
    window = np.sin(np.pi * t / BURST) ** 2
    pair = [
        np.correlate(wave, window * wave_, "valid") for wave_ in (np.sin(2000 * np.pi * t), np.cos(2000 * np.pi * t))
    ]
    energy = np.hypot(*pair)
    threshold = 0.4 * energy.max()
    found = []
    while energy.max() > max(threshold, 0.02 * (window**2).sum()):
        peak = int(energy.argmax())
        found.append(peak / rate)
        energy[max(0, peak - rate // 10) : peak + rate // 10] = 0
    return np.sort(np.array(found))


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """Settings of a media file, with its expected properties."""

    name: str
    fps: tuple[int, int] = (25, 1)  # of the numbered frames; in an interlaced file of its fields
    suffix: str = "mp4"
    audio_late: float = 0.0  # seconds that the sound is shifted against its container clock
    video_late: float = 0.0
    early: float = 0.0  # seconds by which ffmpeg's writer shifts the audio: the matroska muxer (5.1 and later) does not
    # add the codec delay to the timestamps of Opus, and every reader subtracts it
    keep: Callable[[int], bool] = lambda n: True  # the frames that are kept; others go without replacement
    every: int = 1  # 2: two numbered frames become the fields of one
    picture: str = "null"  # ffmpeg filter
    codec: tuple[str, ...] = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-pix_fmt", "yuv420p")
    sound: tuple[str, ...] = ("-c:a", "aac")
    sound_seconds: float = 3.0
    copy: tuple[str, ...] = ()  # options for the input of the copy into the container
    muxer: tuple[str, ...] = ()  # options for its output
    direct: bool = False  # encoded straight into its container: copying would lose the priming of some codecs
    turn: int = 0  # quarter turns that undo the file's rotation
    size: tuple[int, int] = (64, 64)  # to decode to

    def kept(self, frames: int) -> list[int]:
        return [n for n in range(0, frames, self.every) if self.keep(n)]

    @property
    def step(self) -> float:
        """Return the seconds between numbered frames."""
        return self.fps[1] / self.fps[0]

    @property
    def beeps(self) -> np.ndarray:
        """Return the beep times, each at a kept frame."""
        kept = np.array(self.kept(round(3 / self.step))) * self.step
        return np.array([kept[np.abs(kept - beep).argmin()] for beep in BEEPS])


def make(fixture: Fixture, folder: Path, seconds: float = 3.0) -> Path:
    """Write the file: encode into matroska, then copy into the container with the offsets."""
    up, down = fixture.fps
    raw, wav = folder / "raw.rgb", folder / "raw.f32"
    flashes = np.round(fixture.beeps / fixture.step).astype(int)
    numbered_frames(round(seconds * up / down), flashes).tofile(raw)
    beeps = fixture.beeps[fixture.beeps < fixture.sound_seconds - BURST]
    sound(fixture.sound_seconds if seconds == 3.0 else seconds, beeps=beeps).tofile(wav)
    picture = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIDE}x{SIDE}", "-framerate", f"{up}/{down}", "-i", raw]
    heard = ["-f", "f32le", "-ar", RATE, "-ac", "1", "-i", wav]
    runs = groupby(enumerate(n for n in range(round(seconds / fixture.step)) if fixture.keep(n)), lambda p: p[1] - p[0])
    ends = [[n for _, n in run] for _, run in runs]
    chosen = "+".join(f"between(n,{run[0]},{run[-1]})" for run in ends)
    encoding = ["-vf", f"select='{chosen}',{fixture.picture}", *fixture.codec, *fixture.sound]
    encoding += ["-fps_mode", "passthrough"]
    shift = [["-itsoffset", late] for late in (fixture.video_late, fixture.audio_late)]
    out = folder / f"{fixture.name}.{fixture.suffix}"
    if fixture.direct:
        negative = ["-avoid_negative_ts", "disabled"] if fixture.suffix in ("mkv", "webm") else []
        _ffmpeg(*shift[0], *picture, *shift[1], *heard, *encoding, *fixture.muxer, *negative, out)
        return out
    encoded = folder / "encoded.mkv"
    _ffmpeg(*picture, *heard, *encoding, "-avoid_negative_ts", "disabled", encoded)
    both = [part for s in shift for part in (*s, *fixture.copy, "-i", encoded)]
    disabled = ["-avoid_negative_ts", "disabled"] if fixture.suffix == "mkv" else []
    _ffmpeg(*both, "-map", "0:v", "-map", "1:a", "-c", "copy", *disabled, *fixture.muxer, out)
    return out


def _ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *map(str, arguments)], check=True)
