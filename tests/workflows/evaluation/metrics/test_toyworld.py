"""Metrics of the toy world on features with known values."""

from dataclasses import replace

import numpy as np
import pytest

from preprocessing.records import Word
from preprocessing.speech.phonemes import mouth_track
from workflows.evaluation.clip_features import ClipFeatures, ToyVideoFeatures
from workflows.evaluation.metrics.toyworld import phoneme_accuracy, viseme_sync

FPS = 24.0
SPOKEN = [
    Word(word="/m/map", start=0.2, end=0.4),
    Word(word="/ae/", start=0.4, end=0.9),
    Word(word="/p/", start=0.9, end=1.1),
]


def clip_with_mouth(opening: np.ndarray, spoken: np.ndarray | None) -> ClipFeatures:
    picture = ToyVideoFeatures(
        opening=opening,
        head=np.zeros((len(opening), 2)),
        face=np.zeros((4, 3)),
        first_face=np.zeros(3),
        choices={},
        spoken_opening=spoken,
    )
    return ClipFeatures(
        finite=True,
        fps=FPS,
        sample_rate=16000,
        motion=None,
        sharpness=None,
        blocks=None,
        sound=None,
        seams={},
        features={},
        picture=picture,
        speech=None,
    )


def spoken_opening(words: list[Word]) -> np.ndarray:
    return mouth_track(words, np.arange(48) / FPS)["opening"]


def test_a_mouth_that_follows_the_phonemes_has_sync_one():
    spoken = spoken_opening(SPOKEN)
    assert viseme_sync([clip_with_mouth(0.1 + 0.5 * spoken, spoken)])["viseme_sync"].value == pytest.approx(1.0)


def test_a_late_mouth_has_a_lower_sync():
    spoken = spoken_opening(SPOKEN)
    late = [viseme_sync([clip_with_mouth(np.roll(spoken, k), spoken)])["viseme_sync"].value for k in (0, 3, 6)]
    assert late[0] > late[1] > late[2]


def test_a_still_mouth_counts_as_the_worst_value():
    found = viseme_sync([clip_with_mouth(np.zeros(48), spoken_opening(SPOKEN))])["viseme_sync"]
    assert (found.value, found.failed) == (-1.0, 1)


def test_clips_without_spoken_phonemes_do_not_count():
    spoken = clip_with_mouth(spoken_opening(SPOKEN), spoken_opening(SPOKEN))
    silent = clip_with_mouth(spoken_opening(SPOKEN), spoken_opening([]))
    syllables = replace(silent, picture=replace(silent.picture, spoken_opening=None))
    assert viseme_sync([spoken, silent, syllables])["viseme_sync"].count == 1
    assert viseme_sync([silent, syllables]) == {}


def test_phoneme_accuracy_is_the_share_of_correct_frames_per_clip():
    clip = replace(clip_with_mouth(np.zeros(48), None), phonemes=np.array([True, True, False, False]))
    better = replace(clip, phonemes=np.array([True, True, True, True]))
    deaf = replace(clip, phonemes=None)
    found = phoneme_accuracy([clip, better, deaf])["phoneme_accuracy"]
    assert (found.value, found.count) == (0.75, 2)
    assert phoneme_accuracy([deaf]) == {}
