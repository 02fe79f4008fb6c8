"""Phonemes of English, their notation in transcripts, and their mouth shapes.

A transcript of phonemes is a list of timed words of the form ``/hh/hello``: a phoneme between slashes, followed by the
written word that starts with it, or by nothing. The text codec encodes the phoneme only; metrics read the words.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from preprocessing.records import Word

Array = NDArray[np.float64]

PHONEMES = (
    *("aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh", "ih", "iy"),
    *("jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh"),
)
"""ARPAbet with the schwa ``ax``, without stress: the phonemes of the CMU dictionary and of flite."""
PAUSE = "pau"
_TOKEN = re.compile(r"/([a-z]+)/(.*)", re.DOTALL)
_PRECISION = 200  # Hz, rate at which mouth shapes are computed
_BLEND_SECONDS = 0.075  # width of the smoothing of mouth shapes over neighboring phonemes
_CLOSURE_SECONDS = 0.03  # the same for closed lips, which must close completely


def phoneme_token(phoneme: str, word: str = "") -> str:
    """Return the transcript entry of a phoneme that starts the written word `word`, if given."""
    return f"/{phoneme}/{word}"


def parse_token(token: str) -> tuple[str, str] | None:
    """Return phoneme and written word of a transcript entry; None for anything else."""
    match = _TOKEN.fullmatch(token)
    return (match[1], match[2]) if match and match[1] in PHONEMES else None


def is_phoneme_transcript(words: Iterable[Word]) -> bool:
    """Return True if all entries of a non-empty transcript are phonemes."""
    tokens = [parse_token(w.word) for w in words]
    return bool(tokens) and None not in tokens


def spoken_text(words: Iterable[Word]) -> str:
    """Return the written words of a transcript of phonemes or words, joined by blanks."""
    parsed = [(parse_token(w.word), w.word) for w in words]
    texts = [token[1] if token else word for token, word in parsed]
    return " ".join(text for text in texts if text)


@dataclass(frozen=True, kw_only=True)
class MouthShape:
    """Mouth of one phoneme. Lengths are in units of 1/64 of the side of a frame."""

    opening: float  # 0 closed, 1 wide open
    width: float  # half width
    teeth: float = 0.0  # visible share of the opening, from above
    tongue: float = 0.0  # visibility
    lip: float = 1.2  # thickness of the lips


REST = MouthShape(opening=0.0, width=6.0)
_SHAPES: dict[str, MouthShape] = {
    "m b p": MouthShape(opening=0.0, width=6.2, lip=2.2),
    "f v": MouthShape(opening=0.22, width=6.4, teeth=0.95, lip=1.6),
    "th dh": MouthShape(opening=0.3, width=6.6, teeth=0.4, tongue=1.0),
    "t d n": MouthShape(opening=0.28, width=6.6, teeth=0.55),
    "s z": MouthShape(opening=0.2, width=7.6, teeth=1.0),
    "sh zh ch jh": MouthShape(opening=0.32, width=4.6, teeth=0.9, lip=2.0),
    "k g ng hh": MouthShape(opening=0.35, width=6.0, tongue=0.3),
    "l": MouthShape(opening=0.42, width=6.2, teeth=0.25, tongue=1.0),
    "r er": MouthShape(opening=0.35, width=4.4, lip=1.9),
    "w uw": MouthShape(opening=0.26, width=2.9, lip=2.2),
    "uh": MouthShape(opening=0.36, width=4.2, lip=1.8),
    "ow oy ao": MouthShape(opening=0.62, width=4.0, lip=1.7),
    "aa aw ay": MouthShape(opening=1.0, width=5.8, tongue=0.4),
    "ae": MouthShape(opening=0.85, width=7.2, tongue=0.3),
    "ah ax": MouthShape(opening=0.5, width=5.8),
    "eh ey": MouthShape(opening=0.58, width=7.4, teeth=0.2),
    "ih iy y": MouthShape(opening=0.32, width=8.6, teeth=0.4),
}
VISEMES: dict[str, MouthShape] = {phoneme: shape for names, shape in _SHAPES.items() for phoneme in names.split()}
"""Mouth shape of each phoneme. Phonemes with equal shapes look equal."""
_FIELDS = ("opening", "width", "teeth", "tongue", "lip")


def mouth_track(transcript: Sequence[Word], times: Array) -> dict[str, Array]:
    """Return the fields of `MouthShape` at `times`, each ``[n]``.

    Shapes are constant within a phoneme and smoothed over ``_BLEND_SECONDS``, as neighboring phonemes blend in speech.
    The lips are closed in the middle of m, b and p.
    """
    end = max([float(times[-1]) if len(times) else 0.0, *(w.end for w in transcript)]) + 0.5
    count = int(end * _PRECISION) + 1
    shapes = np.tile([getattr(REST, name) for name in _FIELDS], (count, 1))
    closed = np.zeros(count)
    for word in transcript:
        token = parse_token(word.word)
        if token is None:
            continue
        span = slice(
            round(word.start * _PRECISION), max(round(word.end * _PRECISION), round(word.start * _PRECISION) + 1)
        )
        shapes[span] = [getattr(VISEMES[token[0]], name) for name in _FIELDS]
        closed[span] = token[0] in ("m", "b", "p")
    smooth = np.stack([_smoothed(column, _BLEND_SECONDS) for column in shapes.T], axis=1)
    smooth[:, 0] *= 1 - np.clip(1.6 * _smoothed(closed, _CLOSURE_SECONDS), 0, 1)
    at = np.arange(count) / _PRECISION
    return {name: np.interp(times, at, smooth[:, i]) for i, name in enumerate(_FIELDS)}


def _smoothed(values: Array, seconds: float) -> Array:
    kernel = np.hanning(2 * round(seconds * _PRECISION) + 1)
    padded = np.pad(values, len(kernel) // 2, mode="edge")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid").astype(np.float64)
