"""The English voice of the toy world."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mfcore.errors import UserInputError
from preprocessing.speech import flite
from preprocessing.speech.phonemes import is_phoneme_transcript, mouth_track, parse_token, spoken_text
from preprocessing.speech.sentences import HELD_OUT, compose_sentence
from preprocessing.toyworld.audio_reader import loudness_envelope
from preprocessing.toyworld.video_reader import read_video
from preprocessing.toyworld.world import ToyConfig, render_audio, render_frames, sample_truth, write_toyworld

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="the program flite is not installed")
CONFIG = ToyConfig(voice="english", seconds=6.0, seed=3)


def test_without_flite_the_message_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserInputError, match="apt-get install flite"):
        write_toyworld(tmp_path / "out", clips=1, voice="english")
    assert not (tmp_path / "out").exists()


def test_held_out_sentences_are_never_composed():
    rng = np.random.default_rng(0)
    assert not {compose_sentence(rng) for _ in range(2000)} & set(HELD_OUT)


def test_held_out_needs_english():
    with pytest.raises(UserInputError, match="english"):
        ToyConfig(held_out=True)


@needs_flite
def test_phonemes_have_the_times_of_their_sound():
    truth = sample_truth(CONFIG, 0)
    assert is_phoneme_transcript(truth.words)
    assert all(a.end <= b.start + 1e-3 for a, b in zip(truth.words, truth.words[1:], strict=False))
    times, loud = loudness_envelope(render_audio(truth), CONFIG.sample_rate)
    vowels = [w for w in truth.words if (parse_token(w.word) or ("", ""))[0] in ("aa", "ae", "ow", "iy", "ay")]
    inside = np.zeros(len(times), bool)
    for word in truth.words:
        inside |= (times > word.start) & (times < word.end)
    assert len(vowels) > 3
    assert loud[~inside].mean() < 0.1 * loud[inside].mean()


@needs_flite
def test_transcript_carries_the_written_words():
    truth = sample_truth(CONFIG, 0)
    first = truth.sentences[0].text
    letters = "".join(c for c in spoken_text(truth.words).lower() if c.isalpha())
    assert letters[:12] == "".join(c for c in first.lower() if c.isalpha())[:12]


@needs_flite
def test_the_mouth_and_the_choices_are_read_from_the_picture():
    truth = sample_truth(CONFIG, 1)
    read = read_video(render_frames(truth), CONFIG)
    drawn = mouth_track(truth.words, truth.frame_times)["opening"]
    assert np.corrcoef(read.opening, drawn)[0, 1] > 0.95
    for name, choice in read.choices.items():
        assert (choice.mode == np.asarray(truth.choices[name])).mean() == 1
    assert "tone" not in truth.choices


@needs_flite
def test_a_clip_is_a_function_of_seed_and_index(tmp_path: Path):
    config = ToyConfig(voice="english", seconds=3.0, seed=5, held_out=True)
    flite.speak.cache_clear()
    first = render_audio(sample_truth(config, 2))
    flite.speak.cache_clear()
    assert np.array_equal(first, render_audio(sample_truth(config, 2)))
    assert all(s.text in HELD_OUT for s in sample_truth(config, 2).sentences)
    write_toyworld(tmp_path / "w", clips=1, seconds=1.5, voice="english", seed=5)
    note = json.loads((tmp_path / "w" / "toy00000.json").read_text())
    assert note["truth"]["speaker"] in flite.VOICES
    assert set(note["truth"]["choices"]) == {"gaze", "brows", "hand", "light"}
