"""The phoneme recognizer: labels of frames, and what the packaged weights read."""

import shutil

import numpy as np
import pytest
import torch

from preprocessing.records import Word
from preprocessing.speech.flite import VOICES, speak
from preprocessing.speech.phonemes import phoneme_token
from preprocessing.speech.recognizer import LABELS, correct_frames, frame_labels, recognize_frames


def test_labels_are_phonemes_at_their_times_and_pauses_between():
    words = [Word(word="/m/map", start=0.1, end=0.2), Word(word="/ae/", start=0.2, end=0.35)]
    labels = [LABELS[i] for i in frame_labels(words, 50)]
    assert labels == ["pau"] * 10 + ["m"] * 10 + ["ae"] * 15 + ["pau"] * 15


def test_silence_is_read_as_a_pause():
    found = recognize_frames(1e-3 * torch.randn(16000, generator=torch.Generator().manual_seed(0)))
    assert len(found) == 101
    assert (found == LABELS.index("pau")).float().mean() > 0.95


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite")
def test_speech_is_read_and_another_transcript_is_not():
    spoken = speak("The ship sailed across the calm blue sea.", VOICES[0])
    words = [Word(word=phoneme_token(name), start=start, end=end) for name, start, end in spoken.phonemes]
    noise = 0.0008 * np.random.default_rng(0).standard_normal(len(spoken.waveform))  # that of the toy world
    sound = (0.09 / spoken.waveform.std() * spoken.waveform + noise).astype(np.float32)
    assert correct_frames(words, sound).mean() > 0.75
    late = [Word(word=w.word, start=w.start + 0.3, end=w.end + 0.3) for w in words]
    assert correct_frames(late, sound).mean() < 0.3
