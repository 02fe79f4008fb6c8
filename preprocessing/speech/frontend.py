"""Text to phonemes with times: the front end of every place where English text is spoken.

gruut expands numbers and abbreviations and looks words up; a model spells unknown words. Durations are a linear model
of the logarithm, fitted to speech of flite: phoneme, its neighbors, and its distance to the next pause. The fit and its
table are made by ``python -m preprocessing.speech.fit_durations``.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.records import Word
from preprocessing.speech.phonemes import PAUSE, PHONEMES, parse_token, phoneme_token

MAX_WORDS = 2000
"""Largest number of words of one text: more than ten minutes of speech."""
SHORT_PAUSE = 0.22  # seconds, at a comma
LONG_PAUSE = 0.5  # seconds, at the end of a sentence
# fmt: off
_IPA = {  # letters of the International Phonetic Alphabet, escaped because some look like Latin ones
    "\u0251": "aa", "\u00e6": "ae", "\u028c": "ah", "\u0254": "ao", "a\u028a": "aw", "\u0259": "ax", "a\u026a": "ay",
    "b": "b", "t\u0361\u0283": "ch", "d": "d", "\u00f0": "dh", "\u025b": "eh", "\u025a": "er", "\u025d": "er",
    "e\u026a": "ey", "f": "f", "\u0261": "g", "g": "g", "h": "hh", "\u026a": "ih", "i": "iy", "d\u0361\u0292": "jh",
    "k": "k", "l": "l", "m": "m", "n": "n", "\u014b": "ng", "o\u028a": "ow", "\u0254\u026a": "oy", "p": "p",
    "\u0279": "r", "s": "s", "\u0283": "sh", "t": "t", "\u03b8": "th", "\u028a": "uh", "u": "uw", "v": "v", "w": "w",
    "j": "y", "z": "z", "\u0292": "zh", "\u0252": "aa", "\u025c": "er", "o": "ow", "e": "ey", "a": "aa", "x": "k",
    "\u027e": "t", "\u0294": "t",
}
# fmt: on
_STRESS = "\u02c8\u02cc\u02d0"


@dataclass(frozen=True, kw_only=True)
class Pronunciation:
    """A written word with its phonemes; a pause has no word and no phonemes."""

    word: str
    phonemes: tuple[str, ...]
    pause: float = 0.0  # seconds of silence after it


def pronounce(text: str) -> tuple[Pronunciation, ...]:
    """Return the words of an English text with their phonemes.

    Raises:
        UserInputError: The text has no word to speak, letters of another alphabet, or over ``MAX_WORDS`` words.
    """
    _check_alphabet(text)
    if len(text.split()) > MAX_WORDS:
        raise UserInputError(f"the text has {len(text.split())} words: use at most {MAX_WORDS} at a time")
    found: list[Pronunciation] = []
    for sentence in _gruut_sentences(text):
        for word in sentence:
            phonemes = tuple(_IPA[p] for p in map(_without_stress, word.phonemes or ()) if p in _IPA)
            if phonemes:
                found.append(Pronunciation(word=word.text, phonemes=phonemes))
            elif found and word.is_break:
                pause = LONG_PAUSE if word.phonemes and "\u2016" in word.phonemes else SHORT_PAUSE
                found[-1] = Pronunciation(word=found[-1].word, phonemes=found[-1].phonemes, pause=pause)
    if not found:
        raise UserInputError(
            f"the text {_short(text)!r} has no word to speak: use English words, digits or abbreviations"
        )
    return tuple(found)


def phonemes_of_text(text: str, *, start: float = 0.1, speed: float = 1.0, pause_scale: float = 1.0) -> list[Word]:
    """Return the phonemes of an English text with times, as entries ``/hh/hello`` of a transcript.

    Args:
        text: English text; digits and abbreviations are expanded.
        start: Time of the first phoneme in seconds.
        speed: Factor on the rate of speech; 1 is the mean rate of the training voices.
        pause_scale: Factor on the pauses at punctuation.

    Raises:
        UserInputError: The text cannot be spoken, or `speed` or `pause_scale` is out of range.
    """
    if not 0.5 <= speed <= 2:
        raise UserInputError(f"speed {speed:g}: use 0.5 to 2")
    if not 0 <= pause_scale <= 10:
        raise UserInputError(f"pause_scale {pause_scale:g}: use 0 to 10")
    words, at = [], start
    for phrase in _phrases(pronounce(text)):
        phonemes = [p for word in phrase for p in word.phonemes]
        labels = [word.word if i == 0 else "" for word in phrase for i in range(len(word.phonemes))]
        for phoneme, label, seconds in zip(phonemes, labels, predict_durations(phonemes), strict=True):
            end = at + seconds / speed
            words.append(Word(word=phoneme_token(phoneme, label), start=round(at, 3), end=round(end, 3)))
            at = end
        at += phrase[-1].pause * pause_scale
    return words


def phonemes_of_words(words: Sequence[Word]) -> list[Word]:
    """Return the phonemes of written words with known times; each word is divided by the predicted durations.

    Entries that are phonemes already stay. Words without a pronunciation, such as punctuation, are left out.
    """
    found: list[Word] = []
    for word in words:
        if parse_token(word.word):
            found.append(word)
            continue
        try:
            spoken = [p for part in pronounce(word.word) for p in part.phonemes]
        except UserInputError:
            if any(c.isalnum() for c in word.word):
                raise
            continue
        seconds = predict_durations(spoken)
        scale, at = (word.end - word.start) / sum(seconds), word.start
        for i, (phoneme, length) in enumerate(zip(spoken, seconds, strict=True)):
            end = at + length * scale
            label = word.word if i == 0 else ""
            found.append(Word(word=phoneme_token(phoneme, label), start=round(at, 3), end=round(end, 3)))
            at = end
    return found


def _phrases(words: Sequence[Pronunciation]) -> list[list[Pronunciation]]:
    """Split words at pauses."""
    phrases: list[list[Pronunciation]] = [[]]
    for word in words:
        phrases[-1].append(word)
        if word.pause:
            phrases.append([])
    return [phrase for phrase in phrases if phrase]


def duration_features(phonemes: Sequence[str], index: int) -> list[str]:
    """Return the names of the active features of one phoneme of a phrase."""
    padded = [PAUSE, PAUSE, *phonemes, PAUSE, PAUSE]
    before, here, after, second = padded[index + 1 : index + 5]
    left = min(3, len(phonemes) - 1 - index)
    return ["bias", f"is {here}", f"before {before}", f"after {after}", f"second {second}", f"left {left}"]


def predict_durations(phonemes: Sequence[str]) -> list[float]:
    """Return the seconds of each phoneme of a phrase without pauses, at the mean rate of the voices."""
    table = _duration_table()
    logs = (sum(table.get(name, 0.0) for name in duration_features(phonemes, i)) for i in range(len(phonemes)))
    return [min(0.4, max(0.025, math.exp(value))) for value in logs]


@lru_cache(maxsize=1)
def _duration_table() -> dict[str, float]:
    return json.loads(files("preprocessing.speech").joinpath("durations.json").read_text())


def _gruut_sentences(text: str) -> list[list[Any]]:
    from gruut import sentences  # imported here: loading its lexicon takes a second

    return [list(sentence) for sentence in sentences(text, lang="en-us")]


def _without_stress(ipa: str) -> str:
    return "".join(c for c in ipa if c not in _STRESS)


def _check_alphabet(text: str) -> None:
    """Refuse letters that are not Latin: they would be left out silently."""
    foreign = sorted({c for c in text if c.isalpha() and not c.isascii() and ord(c) > 0x24F})
    if foreign:
        raise UserInputError(
            f"the text {_short(text)!r} has letters that cannot be spoken ({' '.join(foreign[:8])}): "
            "the talker speaks English in Latin letters"
        )


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


assert set(_IPA.values()) == set(PHONEMES)
