"""English text to phonemes with times."""

import pytest

from mfcore.errors import UserInputError
from preprocessing.records import Word
from preprocessing.speech.frontend import (
    MAX_WORDS,
    phonemes_of_text,
    phonemes_of_words,
    predict_durations,
    pronounce,
)
from preprocessing.speech.phonemes import is_phoneme_transcript, parse_token, spoken_text


def phonemes(text: str) -> str:
    return " ".join(p for word in pronounce(text) for p in word.phonemes)


def test_words_of_the_lexicon():
    assert phonemes("Hello") == "hh eh l ow"
    assert phonemes("How are you?") == "hh aw aa r y uw"


def test_digits_and_abbreviations_are_spoken():
    assert [w.word for w in pronounce("Dr. Smith has 42 dogs.")] == ["Doctor", "Smith", "has", "forty", "two", "dogs"]


def test_unknown_words_are_spelled_by_the_model():
    assert phonemes("Zoltan").startswith("z ow l t")


def test_times_are_ordered_and_pauses_follow_punctuation():
    words = phonemes_of_text("Hello, you. Yes", start=0.2)
    assert is_phoneme_transcript(words)
    assert words[0].start == 0.2
    gaps = [round(b.start - a.end, 2) for a, b in zip(words, words[1:], strict=False)]
    assert min(gaps) == 0
    labels = [parse_token(w.word)[1] for w in words[1:]]  # pyright: ignore[reportOptionalSubscript]
    assert [gap for gap, label in zip(gaps, labels, strict=True) if label] == [0.22, 0.5]
    assert spoken_text(words) == "Hello you Yes"


def test_speed_and_pauses_can_be_set():
    usual = phonemes_of_text("Hello, you.", start=0)
    fast = phonemes_of_text("Hello, you.", start=0, speed=2, pause_scale=0)
    assert fast[-1].end == pytest.approx((usual[-1].end - 0.22) / 2, abs=0.01)


def test_durations_are_those_of_speech():
    seconds = predict_durations(["dh", "ax", "b", "ow", "t"])
    assert all(0.025 <= s <= 0.4 for s in seconds)
    assert seconds[3] > 2 * seconds[1]  # a stressed diphthong against a schwa


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no word to speak"),
        ("... !?", "no word to speak"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442", "Latin letters"),
        ("go " * (MAX_WORDS + 1), f"at most {MAX_WORDS}"),
    ],
)
def test_text_that_cannot_be_spoken_is_refused_with_the_remedy(text: str, part: str):
    with pytest.raises(UserInputError, match=part):
        phonemes_of_text(text)


@pytest.mark.parametrize("wrong", [{"speed": 0.1}, {"speed": 9}, {"pause_scale": -1}])
def test_speed_and_pause_scale_are_bounded(wrong: dict[str, float]):
    with pytest.raises(UserInputError, match=next(iter(wrong))):
        phonemes_of_text("Hello", **wrong)


def test_words_with_times_are_divided_into_phonemes():
    words = [
        Word(word="Hello,", start=1.0, end=1.5),
        Word(word="-", start=1.5, end=1.6),
        Word(word="you", start=2, end=2.2),
    ]
    found = phonemes_of_words(words)
    assert spoken_text(found) == "Hello, you"
    assert [parse_token(w.word)[0] for w in found] == ["hh", "eh", "l", "ow", "y", "uw"]  # pyright: ignore[reportOptionalSubscript]
    assert (found[0].start, found[3].end, found[4].start, found[5].end) == (1.0, 1.5, 2.0, 2.2)
    assert phonemes_of_words(found) == found
