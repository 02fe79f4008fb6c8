"""Speech of the synthesizer flite, with the times of its phonemes. It runs as a program of the system.

flite prints each phoneme with its end time (``-psdur``) and writes a WAV file. Its voices are models of real speakers.
"""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

from mfcore.errors import UserInputError
from preprocessing.speech.phonemes import PAUSE, PHONEMES

VOICES = ("slt", "rms", "awb", "kal16")
"""Voices of flite at 16 kHz: one female, three male."""
SAMPLE_RATE = 16000  # Hz
_TIMEOUT = 60.0  # seconds for one sentence


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One spoken sentence."""

    waveform: NDArray[np.float32]  # [samples] at SAMPLE_RATE, without the pauses around it
    phonemes: tuple[tuple[str, float, float], ...]  # phoneme, start and end in seconds; pauses are left out


def require_flite() -> None:
    """Raise UserInputError if the program is missing."""
    if shutil.which("flite") is None:
        raise UserInputError(
            "the program flite, which speaks the English of the toy world, is not installed. "
            "Install it (Debian, Ubuntu: sudo apt-get install flite; macOS: brew install flite), "
            "or use --voice syllables"
        )


@lru_cache(maxsize=64)
def speak(text: str, voice: str, stretch: float = 1.0) -> Utterance:
    """Return `text` spoken by one of `VOICES`; `stretch` multiplies the durations.

    Raises:
        UserInputError: flite is not installed.
        RuntimeError: flite failed.
    """
    require_flite()
    with tempfile.TemporaryDirectory(prefix="mfctl-flite-") as folder:
        file = Path(folder) / "speech.wav"
        command = [
            "flite",
            "-voice",
            voice,
            "--setf",
            f"duration_stretch={stretch:g}",
            "-psdur",
            "-t",
            text,
            "-o",
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        if done.returncode or not file.exists():
            raise RuntimeError(f"flite failed with code {done.returncode}: {done.stderr.strip()[-300:]}")
        rate, samples = wavfile.read(file)
    if rate != SAMPLE_RATE:
        raise RuntimeError(f"flite voice {voice!r} speaks at {rate} Hz: use one of {', '.join(VOICES)}")
    return _trimmed((samples / 32768).astype(np.float32), _read_durations(done.stdout))


def _read_durations(printed: str) -> list[tuple[str, float, float]]:
    """Return phonemes with start and end from ``name:end`` pairs; flite starts again at 0 with each sentence part."""
    found: list[tuple[str, float, float]] = []
    offset = last = 0.0
    for item in printed.split():
        name, _, end = item.rpartition(":")
        if float(end) < last:
            offset += last
            last = 0.0
        found.append((name, offset + last, offset + float(end)))
        last = float(end)
    unknown = {name for name, _, _ in found} - {*PHONEMES, PAUSE}
    if unknown:
        raise RuntimeError(f"flite printed unknown phonemes {sorted(unknown)}")
    return found


def _trimmed(waveform: NDArray[np.float32], phonemes: list[tuple[str, float, float]]) -> Utterance:
    """Remove the pauses before the first and after the last phoneme."""
    spoken = [p for p in phonemes if p[0] != PAUSE]
    if not spoken:
        return Utterance(waveform=np.zeros(0, np.float32), phonemes=())
    start, end = spoken[0][1], spoken[-1][2]
    part = waveform[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    return Utterance(waveform=part, phonemes=tuple((name, a - start, b - start) for name, a, b in spoken))
