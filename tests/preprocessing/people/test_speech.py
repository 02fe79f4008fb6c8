"""Voice activity, quality and speaker of known sounds. Models need the extra ``people``."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from preprocessing.people import packages, speech
from preprocessing.people.config import PeopleConfig
from preprocessing.people.packages import INSTALL, check_packages, model_file
from preprocessing.people.speech_step import check_speech
from preprocessing.records import Clip, Rejected, Source
from preprocessing.speech.flite import SAMPLE_RATE, speak

RATE = speech.RATE
SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody was there to see it."


def _missing() -> str:
    try:
        check_packages()
    except ValueError as error:
        return str(error)
    return ""


needs_models = pytest.mark.skipif(bool(_missing()), reason=f"needs the extra people: {_missing()}")
needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="the program flite is not installed")


def _spoken(voice="slt"):
    return speech.to_model_rate(speak(SENTENCE, voice).waveform, SAMPLE_RATE)


def _clip(sound):
    return Clip(
        source=Source(uri="x", size=0, fingerprint=""), span=(0.0, len(sound) / RATE), frames=None, waveform=sound
    )


def _music(seconds=4.0):
    t = np.arange(round(seconds * RATE)) / RATE
    notes = 220 * 2 ** (np.array([0, 4, 7, 12, 7, 4])[(t * 4).astype(int) % 6] / 12)
    return (0.2 * np.sin(2 * np.pi * np.cumsum(notes) / RATE)).astype(np.float32)


@needs_models
@needs_flite
def test_speech_is_told_from_music_and_silence():
    sound = _spoken()
    seconds = speech.speech_seconds(speech.voice_activity(sound))
    assert 0.8 * len(sound) / RATE < seconds <= len(sound) / RATE + 0.04
    assert speech.speech_seconds(speech.voice_activity(_music())) < 0.3
    assert speech.speech_seconds(speech.voice_activity(np.zeros(RATE * 3, np.float32))) == 0


@needs_models
@needs_flite
def test_speech_is_found_where_it_is():
    sound = np.concatenate([np.zeros(2 * RATE, np.float32), _spoken(), np.zeros(2 * RATE, np.float32)])
    (active,) = np.nonzero(speech.voice_activity(sound))
    begin, end = active[0] * speech.VAD_WINDOW / RATE, (active[-1] + 1) * speech.VAD_WINDOW / RATE
    assert begin == pytest.approx(2, abs=0.15)
    assert end == pytest.approx(len(sound) / RATE - 2, abs=0.3)


@needs_models
@needs_flite
def test_noise_lowers_the_quality():
    sound = _spoken()
    noise = np.random.default_rng(0).normal(0, 0.1, len(sound)).astype(np.float32)
    assert speech.speech_quality(sound + noise) < speech.speech_quality(sound) - 0.5
    assert speech.speech_quality(np.zeros(0, np.float32)) is None


@needs_models
@needs_flite
def test_a_voice_is_more_similar_to_itself_than_to_another():
    first, second = (np.array_split(_spoken(voice), 2) for voice in ("slt", "rms"))
    same = [float(np.dot(*map(speech.speaker_embedding, halves))) for halves in (first, second)]
    other = [float(np.dot(speech.speaker_embedding(a), speech.speaker_embedding(b))) for a in first for b in second]
    assert min(same) > max(other) + 0.1
    assert speech.speaker_embedding(first[0][:RATE]) is None  # too short


@needs_models
@needs_flite
@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        (_music, "no_speech"),
        (lambda: np.concatenate([_spoken("slt"), _spoken("rms")]), "several_voices"),
        (lambda: _spoken() + np.random.default_rng(0).normal(0, 0.2, len(_spoken())).astype(np.float32), "noisy"),
    ],
)
def test_reasons(sound, reason):
    with pytest.raises(Rejected) as rejected:
        check_speech(_clip(sound()), PeopleConfig(), sample_rate=RATE)
    assert rejected.value.reason == reason


@needs_models
@needs_flite
def test_one_voice_is_measured_and_the_rate_does_not_matter():
    clip = check_speech(_clip(_spoken()), PeopleConfig(), sample_rate=RATE)
    assert clip.speech.seconds > 2
    assert clip.speech.voice_similarity > 0.6
    assert clip.speech.quality > 2
    from scipy.signal import resample_poly

    other = replace(clip, waveform=resample_poly(clip.waveform, 3, 1).astype(np.float32))
    again = check_speech(other, PeopleConfig(), sample_rate=3 * RATE)
    assert again.speech.seconds == pytest.approx(clip.speech.seconds, abs=0.1)


def test_mel_filters_have_unit_area_and_cover_all_frequencies():
    bank = speech.slaney_filterbank()
    assert bank.shape == (40, 201)
    hz = RATE / speech.MEL_WINDOW
    assert np.allclose(bank[10:].sum(1) * hz, 1, atol=0.15)
    assert (bank[:, 1:-1].sum(0) > 0).all()


def test_missing_package_is_one_message_with_the_command(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package Resemblyzer is missing") as error:
        model_file("speaker")
    assert INSTALL in str(error.value)
    with pytest.raises(ValueError, match="ai-edge-litert is missing"):
        check_packages()
