"""Files with a known clock, made by ffmpeg: every frame carries its number, every two thirds of a second there is a
beep.

The picture is a still texture with 16 squares that spell the frame number in binary, and a patch that flashes with the
beeps; the sound is a quiet tone with bursts of 1 kHz.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIDE, SQUARE = 128, 16
RATE = 44100
BEEPS = np.array([0.5, 1.1, 1.75, 2.3])  # seconds on the sound's own clock
BURST = 0.04  # seconds


def numbered_frames(count: int) -> np.ndarray:
    """uint8 (count, SIDE, SIDE, 3); frame i spells i in its two upper rows of squares."""
    texture = np.random.default_rng(0).integers(60, 130, (SIDE // 8, SIDE // 8, 3))
    frames = np.repeat(np.kron(texture, np.ones((8, 8, 1)))[None], count, 0).astype(np.uint8)
    for i in range(count):
        for bit in range(16):
            y, x = bit // 8 * SQUARE, bit % 8 * SQUARE
            frames[i, y : y + SQUARE, x : x + SQUARE] = 235 if i >> bit & 1 else 20
    return frames


def read_numbers(frames: np.ndarray) -> np.ndarray:
    """The number that each decoded frame spells, whatever its size."""
    edge = frames.shape[1] * SQUARE // SIDE
    grey = frames.astype(float).mean(3)
    numbers = np.zeros(len(frames), int)
    for bit in range(16):
        y, x = bit // 8 * edge, bit % 8 * edge
        middle = grey[:, y + edge // 4 : y + edge - edge // 4, x + edge // 4 : x + edge - edge // 4].mean((1, 2))
        numbers |= (middle > 127).astype(int) << bit
    return numbers


def burst(rate: int) -> np.ndarray:
    t = np.arange(round(BURST * rate)) / rate
    return np.sin(2 * np.pi * 1000 * t) * np.sin(np.pi * t / BURST) ** 2


def sound(seconds: float, rate: int = RATE, beeps: np.ndarray = BEEPS) -> np.ndarray:
    """A quiet tone with a burst from each beep time on."""
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.01 * np.sin(2 * np.pi * 220 * t)
    for beep in beeps:
        late = round(beep * rate)
        shape = burst(rate)[: max(0, len(wave) - late)]
        wave[late : late + len(shape)] += 0.6 * shape
    return wave.astype(np.float32)


def find_beeps(wave: np.ndarray, rate: int) -> np.ndarray:
    """Start times of the bursts, seconds, by matched filter."""
    t = np.arange(round(BURST * rate)) / rate
    window = np.sin(np.pi * t / BURST) ** 2
    pair = [
        np.correlate(wave, window * wave_, "valid") for wave_ in (np.sin(2000 * np.pi * t), np.cos(2000 * np.pi * t))
    ]
    energy = np.hypot(*pair)
    found = []
    while energy.max() > 0.5 * 0.6 * (window**2).sum() / 2:
        peak = int(energy.argmax())
        found.append(peak / rate)
        energy[max(0, peak - rate // 10) : peak + rate // 10] = 0
    return np.sort(np.array(found))


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """A way to make a file, and what is true of it."""

    name: str
    fps: tuple[int, int] = (25, 1)
    suffix: str = "mp4"
    audio_late: float = 0.0  # seconds that the sound is shifted against its container clock
    video_late: float = 0.0
    keep: str = "1"  # ffmpeg expression of the frames that are kept; others are dropped without replacement
    options: tuple[str, ...] = ("-c:a", "aac")

    def kept(self, frames: int) -> list[int]:
        expression = self.keep.replace("mod(n,7)", "(n%7)").replace("mod(n,5)", "(n%5)")
        return [n for n in range(frames) if eval(expression, {"lt": lambda a, b: a < b}, {"n": n})]


def make(fixture: Fixture, folder: Path, seconds: float = 3.0) -> Path:
    """Write the fixture's file: encode at offset 0 into matroska, then copy into its container with the offsets."""
    up, down = fixture.fps
    raw, wav, encoded = folder / "raw.rgb", folder / "raw.f32", folder / "encoded.mkv"
    numbered_frames(round(seconds * up / down)).tofile(raw)
    sound(seconds).tofile(wav)
    command = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{SIDE}x{SIDE}",
        "-framerate",
        f"{up}/{down}",
        "-i",
        str(raw),
    ]
    command += ["-f", "f32le", "-ar", str(RATE), "-ac", "1", "-i", str(wav), "-vf", f"select='{fixture.keep}'"]
    command += ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-pix_fmt", "yuv420p", *fixture.options]
    _ffmpeg(*command, "-avoid_negative_ts", "disabled", str(encoded))
    out = folder / f"{fixture.name}.{fixture.suffix}"
    late = ["-itsoffset", str(fixture.video_late), "-i", str(encoded), "-itsoffset", str(fixture.audio_late)]
    late += ["-i", str(encoded), "-map", "0:v", "-map", "1:a", "-c", "copy"]
    _ffmpeg(*late, *(["-avoid_negative_ts", "disabled"] if fixture.suffix == "mkv" else []), str(out))
    return out


def _ffmpeg(*arguments: str) -> None:
    subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *arguments], check=True)
