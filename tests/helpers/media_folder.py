"""A small folder of good and bad files, made once per test session."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from preprocessing.media.mp4_writer import write_mp4
from tests.helpers.av_clock_media import numbered_frames, sound

FPS, RATE = Fraction(24), 16000


def write_clip(path: Path, seconds: float, picture: bool = True, heard: bool = True) -> Path:
    frames = numbered_frames(round(seconds * FPS)) if picture else None
    write_mp4(path, frames, FPS, sound(seconds, RATE) if heard else None, sample_rate=RATE)
    return path


def make_folder(folder: Path) -> Path:
    """Write five sources: two with clips, one too short, one without audio, one text file."""
    folder.mkdir()
    write_clip(folder / "good.mp4", 2.2)
    words = [{"word": "ba", "start": 0.2, "end": 0.4}, {"word": "do", "start": 2.2, "end": 2.4}]
    (folder / "long.json").write_text(json.dumps({"caption": "a texture", "transcript": words}))
    write_clip(folder / "long.mp4", 3.2)
    write_clip(folder / "mute.mp4", 2.2, heard=False)
    write_clip(folder / "short.mp4", 0.4)
    (folder / "text.mp4").write_text("not a media file")
    (folder / "notes.md").write_text("not a source")
    return folder


def silent_black() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((60, 64, 64, 3), np.uint8), np.zeros(40000, np.float32)
