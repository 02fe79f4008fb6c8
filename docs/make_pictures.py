"""Write the pictures of the README: the talker with its waveform, as animated WebP and as mp4 with sound.

    python docs/make_pictures.py                              # the packaged model
    python docs/make_pictures.py --checkpoint runs/mutual --transcript "Good morning." --seed 3

The clip is that of ``mfctl generate`` with the same checkpoint, transcript and seed, scaled up.
"""

import argparse
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from preprocessing.media.decoder import decode_range
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.media.probe import probe
from preprocessing.speech.phonemes import parse_token
from workflows.checkpoints.packaged import DEFAULT_MODEL
from workflows.inference.generate import ClipPrompt, generate_clip

ASSETS = Path(__file__).resolve().parent / "assets"
TRANSCRIPT = (
    "Hello! I am a very small network. I learned to speak in two hours, on two processor cores. Nice to meet you."
)
SIDE = 384  # pixels of the upscaled picture
TEXT_HEIGHT, WAVE_HEIGHT = 36, 68  # pixels of the strips below it
MAX_BYTES = 3_000_000  # of the WebP
QUALITIES = (80, 70, 60, 50, 40)  # of the WebP, tried in this order
MARGIN = 12  # pixels at the sides of text and waveform
BARS = 90
PAPER, INK, PALE, ACCENT = (250, 250, 247), (40, 44, 52), (178, 182, 190), (216, 86, 52)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A generated clip."""

    frames: NDArray[np.uint8]  # [n, H, W, 3]
    sound: NDArray[np.float32]  # [samples]
    fps: Fraction
    sample_rate: int
    words: tuple[tuple[str, float], ...]  # written words with the time at which they start


def make_clip(checkpoint: str, transcript: str, *, seed: int, steps: int | None) -> Clip:
    """Generate a clip and read it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        facts = generate_clip(checkpoint, ClipPrompt(transcript=transcript), out=str(path), seed=seed, steps=steps)
        info = probe(path)
        assert info.video is not None
        assert info.audio is not None
        fps = Fraction(facts["fps"]).limit_denominator(1000)
        frames, sound = decode_range(
            path, 0.0, facts["seconds"], fps=fps, size=(info.video.height, info.video.width), sample_rate=16000
        )
    assert frames is not None
    assert sound is not None
    return Clip(frames=frames, sound=sound, fps=fps, sample_rate=16000, words=written_words(facts["transcript"]))


def written_words(transcript: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, float], ...]:
    """Return the written words of a transcript of words or phonemes with their start in seconds."""
    parsed = [(parse_token(w["word"]), w) for w in transcript]
    return tuple((token[1] if token else w["word"], w["start"]) for token, w in parsed if not token or token[1])


class Poster:
    """Draws the frames of a clip with text and waveform below."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.font = ImageFont.load_default(size=19)
        self.lines = self._wrapped()
        parts = np.array_split(np.abs(clip.sound), BARS)
        peaks = np.asarray([np.sqrt(np.square(part).mean()) for part in parts])
        self.bars = peaks / max(float(peaks.max()), 1e-3)

    def draw(self, index: int) -> NDArray[np.uint8]:
        """Return frame `index`, uint8 [SIDE + strips, SIDE, 3]."""
        page = Image.new("RGB", (SIDE, SIDE + TEXT_HEIGHT + WAVE_HEIGHT), PAPER)
        frame = Image.fromarray(self.clip.frames[index])
        page.paste(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, 0))
        pen, seconds = ImageDraw.Draw(page), float(index / self.clip.fps)
        self._draw_text(pen, seconds)
        self._draw_wave(pen, index / max(len(self.clip.frames) - 1, 1))
        return np.asarray(page)

    def _draw_text(self, pen: ImageDraw.ImageDraw, seconds: float) -> None:
        line = next(
            (line for line in reversed(self.lines) if line[0][1] <= seconds), self.lines[0] if self.lines else []
        )
        x = (SIDE - pen.textlength(" ".join(word for word, _ in line), font=self.font)) / 2
        for word, start in line:
            pen.text((x, SIDE + 8), word, font=self.font, fill=INK if start <= seconds else PALE)
            x += pen.textlength(f"{word} ", font=self.font)

    def _draw_wave(self, pen: ImageDraw.ImageDraw, done: float) -> None:
        middle, step = SIDE + TEXT_HEIGHT + WAVE_HEIGHT // 2 - 4, (SIDE - 2 * MARGIN) / BARS
        for i, bar in enumerate(self.bars):
            half = max(1.0, float(bar) * (WAVE_HEIGHT / 2 - 8))
            color = ACCENT if (i + 0.5) / BARS <= done else PALE
            left = MARGIN + i * step
            pen.rectangle((left + 0.5, middle - half, left + step - 1.5, middle + half), fill=color)

    def _wrapped(self) -> list[list[tuple[str, float]]]:
        """Return the words in lines that fit below the picture; a line ends where a sentence may end."""
        lines: list[list[tuple[str, float]]] = []
        for word in self.clip.words:
            text = " ".join([*(w for w, _ in lines[-1]), word[0]]) if lines else ""
            if not lines or self.font.getlength(text) > SIDE - 2 * MARGIN:
                lines.append([])
            lines[-1].append(word)
        return lines


def write_webp(frames: Sequence[NDArray[np.uint8]], fps: Fraction, path: Path) -> int:
    """Write every second frame as an animation below MAX_BYTES and return its quality.

    Raises:
        SystemExit: No quality is small enough.
    """
    images = [Image.fromarray(frame) for frame in frames[::2]]
    duration = round(2000 / fps)  # milliseconds
    for quality in QUALITIES:
        data = io.BytesIO()
        images[0].save(
            data, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, quality=quality, method=4
        )
        if data.tell() < MAX_BYTES:
            path.write_bytes(data.getvalue())
            return quality
    raise SystemExit(f"{path} would exceed {MAX_BYTES} bytes: use a shorter transcript")


def main(argv: Sequence[str] | None = None) -> None:
    """Write talker.webp and talker.mp4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default=DEFAULT_MODEL, help="checkpoint or packaged model (default: %(default)s)"
    )
    parser.add_argument("--transcript", default=TRANSCRIPT, help="spoken text")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and character (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="solver steps per chunk (default: that of mfctl generate)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="output folder (default: docs/assets)")
    given = parser.parse_args(argv)
    clip = make_clip(given.checkpoint, given.transcript, seed=given.seed, steps=given.steps)
    poster = Poster(clip)
    frames = [poster.draw(i) for i in range(len(clip.frames))]
    given.out.mkdir(parents=True, exist_ok=True)
    quality = write_webp(frames, clip.fps, given.out / "talker.webp")
    write_mp4(given.out / "talker.mp4", np.stack(frames), clip.fps, clip.sound, sample_rate=clip.sample_rate)
    for name in ("talker.webp", "talker.mp4"):
        print(f"{given.out / name}: {(given.out / name).stat().st_size / 1e6:.2f} MB")
    print(f"{len(frames) / float(clip.fps):.1f} s, WebP quality {quality}")


if __name__ == "__main__":
    main()
