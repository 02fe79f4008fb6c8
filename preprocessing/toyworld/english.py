"""English speech of the toy world: sentences of flite voices with pauses, as phonemes with times."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from scipy.signal import resample_poly

from preprocessing.records import Word
from preprocessing.speech.flite import SAMPLE_RATE, VOICES, Utterance, speak
from preprocessing.speech.frontend import pronounce
from preprocessing.speech.phonemes import phoneme_token
from preprocessing.speech.sentences import HELD_OUT, compose_sentence

_LEVEL = 0.09  # rms of a spoken sentence
_NOISE_LEVEL = 0.0008  # rms of the background noise, that of the syllables
_LONG_PAUSE = 0.25  # share of pauses of 1 to 4 seconds, in which the character listens
_FADE = 0.01  # seconds at both ends of a sentence


@dataclass(frozen=True, kw_only=True)
class SpokenSentence:
    """One sentence of a clip."""

    text: str
    start: float  # seconds
    stretch: float  # factor on the durations


def draw_sentences(
    rng: np.random.Generator, *, seconds: float, voice: int, held_out: bool
) -> tuple[tuple[SpokenSentence, ...], tuple[Word, ...]]:
    """Draw the sentences of a clip of `seconds` and return them with the transcript of phonemes.

    The last sentence is cut where the clip ends. With `held_out`, sentences are those that training never contains.
    """
    stretch = float(rng.uniform(0.9, 1.2))
    at = float(rng.uniform(0.05, 0.3)) if rng.random() > _LONG_PAUSE else float(rng.uniform(0.5, 2))
    sentences: list[SpokenSentence] = []
    transcript: list[Word] = []
    while at < seconds - 0.5:
        text = HELD_OUT[int(rng.integers(len(HELD_OUT)))] if held_out else compose_sentence(rng)
        sentence = SpokenSentence(text=text, start=at, stretch=stretch)
        spoken = speak(text, VOICES[voice], stretch)
        transcript += _timed_words(sentence, spoken)
        sentences.append(sentence)
        pause = rng.uniform(1, 4) if rng.random() < _LONG_PAUSE else rng.uniform(0.2, 0.7)
        at += len(spoken.waveform) / SAMPLE_RATE + float(pause)
    kept = tuple(w for w in transcript if w.end <= seconds)
    return tuple(sentences), kept


def _timed_words(sentence: SpokenSentence, spoken: Utterance) -> list[Word]:
    """Return the phonemes of flite with times in the clip; the written words come from the front end.

    Both look words up in a similar lexicon. Each word starts at the phoneme that is aligned with its first one.
    """
    spoken_names = [name for name, _, _ in spoken.phonemes]
    labels = _word_starts(sentence.text, spoken_names)
    return [
        Word(
            word=phoneme_token(name, labels.get(i, "")),
            start=round(sentence.start + start, 3),
            end=round(sentence.start + end, 3),
        )
        for i, (name, start, end) in enumerate(spoken.phonemes)
    ]


def _word_starts(text: str, spoken_names: Sequence[str]) -> dict[int, str]:
    words = pronounce(text)
    expected = [p for word in words for p in word.phonemes]
    place: dict[int, int] = {}
    for block in Levenshtein.opcodes(expected, spoken_names):
        for offset in range(block.src_end - block.src_start):
            place[block.src_start + offset] = min(block.dest_start + offset, max(block.dest_end - 1, block.dest_start))
    found: dict[int, str] = {}
    first = 0
    for word in words:
        index = min(place.get(first, 0), len(spoken_names) - 1)
        found[index] = f"{found[index]} {word.word}" if index in found else word.word
        first += len(word.phonemes)
    return found


def render_speech(
    sentences: Sequence[SpokenSentence], *, voice: int, samples: int, sample_rate: int, seed: int
) -> NDArray[np.float32]:
    """Return the spoken sentences with background noise, float32 ``[samples]`` in [-1, 1]."""
    total = np.zeros(samples, np.float64)
    for sentence in sentences:
        wave = speak(sentence.text, VOICES[voice], sentence.stretch).waveform.astype(np.float64)
        wave *= _LEVEL / max(float(np.sqrt(np.square(wave).mean())), 1e-6)
        ramp = np.clip(np.arange(len(wave)) / (_FADE * SAMPLE_RATE), 0, 1)
        wave *= ramp * ramp[::-1]
        if sample_rate != SAMPLE_RATE:
            wave = resample_poly(wave, sample_rate, SAMPLE_RATE)
        first = round(sentence.start * sample_rate)
        part = wave[: samples - first]
        total[first : first + len(part)] += part
    total += _NOISE_LEVEL * np.random.default_rng([seed, 0x50]).standard_normal(samples)
    return np.clip(total, -1, 1).astype(np.float32)
