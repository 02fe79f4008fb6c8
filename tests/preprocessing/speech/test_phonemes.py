"""Phoneme notation, mouth shapes, and their vectors."""

import numpy as np
import torch

from mfcore.codecs.hashed_words import HashedWordEncoder
from preprocessing.records import Word
from preprocessing.speech.phonemes import (
    PHONEMES,
    REST,
    VISEMES,
    is_phoneme_transcript,
    mouth_track,
    parse_token,
    phoneme_token,
    spoken_text,
)


def words_of(*tokens: str, seconds: float = 0.1) -> list[Word]:
    return [Word(word=t, start=i * seconds, end=(i + 1) * seconds) for i, t in enumerate(tokens)]


def test_tokens_carry_phoneme_and_word():
    assert parse_token(phoneme_token("hh", "hello")) == ("hh", "hello")
    assert parse_token("/ow/") == ("ow", "")
    assert parse_token("hello") is None
    assert parse_token("/qq/") is None


def test_spoken_text_of_phonemes_and_of_words():
    assert spoken_text(words_of("/hh/Hello", "/eh/", "/l/", "/ow/", "/y/you", "/uw/")) == "Hello you"
    assert spoken_text(words_of("good", "day")) == "good day"
    assert is_phoneme_transcript(words_of("/hh/hi", "/ay/"))
    assert not is_phoneme_transcript(words_of("/hh/hi", "there"))
    assert not is_phoneme_transcript([])


def test_every_phoneme_has_a_mouth_shape():
    assert set(VISEMES) == set(PHONEMES)


def test_the_mouth_opens_for_vowels_and_closes_for_m_b_and_p():
    transcript = words_of("/aa/", "/m/", "/aa/", "/b/", "/iy/", seconds=0.12)
    middles = np.asarray([(w.start + w.end) / 2 for w in transcript])
    opening = mouth_track(transcript, middles)["opening"]
    assert opening[[0, 2]].min() > 0.7
    assert opening[[1, 3]].max() < 0.02
    assert 0.2 < opening[4] < 0.5


def test_the_mouth_rests_in_silence():
    track = mouth_track(words_of("/aa/"), np.asarray([1.0, 2.0]))
    assert np.allclose(track["opening"], 0, atol=1e-6)
    assert np.allclose(track["width"], REST.width)


def test_phoneme_vectors_are_nearly_orthogonal_and_ignore_the_word():
    encoder = HashedWordEncoder()
    vectors = encoder.encode([phoneme_token(p) for p in PHONEMES])
    assert torch.equal(vectors[PHONEMES.index("hh")], encoder.encode(["/hh/hello"])[0])
    assert torch.allclose(vectors.square().mean(-1), torch.ones(len(PHONEMES)))
    cosine = vectors @ vectors.T / encoder.width
    assert float((cosine - torch.eye(len(PHONEMES))).abs().max()) < 0.55
    spelled = encoder.encode(["aa", "ae"])  # words share their letters
    assert float(spelled[0] @ spelled[1] / encoder.width) > 0.1
