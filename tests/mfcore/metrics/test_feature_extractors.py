"""Metrics of bootstrap, picture, sound, lips and classes against planted truths; networks of random weights, loaded."""

import math

import numpy as np
import pytest
import torch

from mfcore.flow import TimeConfig
from mfcore.metrics.bootstrap import mean_interval
from mfcore.metrics.distributions import kl_divergence, smoothed_distribution
from mfcore.metrics.history_use import history_use, mode_history_use
from mfcore.metrics.lip_sync_error import lip_sync_error
from mfcore.metrics.signal_quality import clipped_fraction, sharpness, silent_fraction
from mfcore.metrics.speech import Whisper, _english_normalizer, normalize_words, resample
from mfcore.metrics.syncnet import SyncNet, SyncNetSync
from mfcore.types import AUDIO, VIDEO
from tests.helpers.tiny_model import batch, network
from tests.helpers.tiny_pretrained import save_whisper


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_a_bootstrap_interval_has_its_nominal_coverage():
    covered = 0
    for seed in range(200):
        found = mean_interval(draw(40, seed=seed), draws=200)
        covered += found.low <= 0 <= found.high
    assert 0.82 <= covered / 200 <= 0.96
    assert mean_interval([3.0]).low == 3.0
    assert mean_interval([1, 3], [2, 2]).value == 1
    with pytest.raises(ValueError, match="all weights are 0"):
        mean_interval([0], [0])
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_sharpness_falls_with_blur():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    blurred = ((frames.astype(int) + np.roll(frames, 1, 1)) // 2).astype(np.uint8)
    assert (sharpness(blurred) < 0.8 * sharpness(frames)).all()
    assert (sharpness(np.full((3, 8, 8, 3), 90, np.uint8)) == 0).all()
    assert sharpness(np.zeros((3, 2, 8, 3), np.uint8)).shape == (3,)


def test_clipping_and_silence_are_shares():
    sound = np.concatenate([np.zeros(8000), np.full(4000, 1.0), np.full(4000, 0.5)])
    assert clipped_fraction(sound) == 0.25
    assert silent_fraction(sound, 16000) == pytest.approx(0.5, abs=0.11)
    assert math.isnan(clipped_fraction(np.zeros(0)))


@pytest.mark.parametrize("late", [0, 4, -7])
def test_lips_find_a_planted_offset(late: int):
    lips = draw(80, 32)
    found = lip_sync_error(lips, np.roll(lips, late, axis=0))
    assert found is not None
    assert found.offset_sec == pytest.approx(late / 25)
    assert found.confidence > 4


def test_lip_sync_error_grows_with_noise_and_is_at_chance_for_another_clip():
    lips, other = draw(80, 32), draw(80, 32, seed=1)
    steps = [lip_sync_error(lips, lips + noise * other) for noise in (0.0, 0.5, 1.0, 3.0)]
    confidence = [s.confidence for s in steps if s]
    distance = [s.distance for s in steps if s]
    assert confidence == sorted(confidence, reverse=True) and distance == sorted(distance)
    chance = lip_sync_error(lips, other)
    assert chance is not None and chance.confidence < 0.5 < 0.1 * confidence[0]
    assert lip_sync_error(lips[:1], lips[:1]) is None
    with pytest.raises(ValueError, match="one of each per frame"):
        lip_sync_error(lips, other[:5])


def test_lip_sync_error_equals_the_offset_of_syncnet():
    torch.manual_seed(0)
    sync = SyncNetSync(SyncNet().eval())
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    sound = 0.1 * draw(16000)
    error, reference = lip_sync_error(*sync.vectors(frames, 25.0, sound, 16000)), sync(frames, 25.0, sound, 16000)
    assert error is not None
    assert error.offset_sec == pytest.approx(reference.offset_sec)
    assert error.confidence == pytest.approx(reference.confidence, abs=1e-3)
    assert sync.vectors(frames[:3], 25.0, sound, 16000)[0].shape == (0, 1024)


def test_divergence_of_known_distributions():
    p, q = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    assert kl_divergence(p, p) == 0
    assert kl_divergence(p, q) == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2))
    assert kl_divergence(p, np.array([1.0, 0.0])) == np.inf
    assert smoothed_distribution(np.array([9, 0])) == pytest.approx([0.95, 0.05])
    with pytest.raises(ValueError, match="adding up to 1"):
        kl_divergence(p, np.array([0.5, 0.6]))


def test_history_use_of_the_multi_step_mode_agrees_with_the_objective():
    """Without the first chunk, which has no history and equal errors."""
    model, data = network(), batch(rows=3)
    time = TimeConfig(shift={VIDEO: 3.0, AUDIO: 1.0})
    ours, theirs = mode_history_use(model, data, time, mode="multi", trust=None), history_use(model, data, time, 0)
    for m, value in theirs.items():
        assert (ours[m] - 1) * (value - 1) >= 0
        assert abs(ours[m] - 1) >= abs(value - 1) - 1e-6
    few = mode_history_use(model, data, time, mode="few", trust=1.0)
    assert few.keys() == theirs.keys() and all(v > 0 for v in few.values())
    with pytest.raises(ValueError, match="two or more clips"):
        mode_history_use(model, batch(rows=1), time, mode="few", trust=1.0)


def test_words_are_normalized_as_whisper_writes_them():
    pytest.importorskip("transformers")
    assert normalize_words("Don't STOP, now - Mr. Forty-Two!") == ["do", "not", "stop", "now", "mister", "42"]


def test_normalized_words_need_transformers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _english_normalizer.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'mutual-forcing\[speech\]'"):
        normalize_words("a")


@pytest.mark.parametrize("rate", [44100, 22050, 16000, 8000])
def test_syncnet_resampler_keeps_a_tone(rate: int):
    """The former linear interpolation behind a box filter was 0.003 off at 44.1 kHz."""
    tone = lambda hertz: 0.3 * np.sin(2 * np.pi * 440 * np.arange(hertz) / hertz)
    inner = slice(200, -200)  # the filter rings at the ends
    resampled = resample(tone(rate), rate, 16000)
    assert len(resampled) == 16000
    np.testing.assert_allclose(resampled[inner], tone(16000)[inner], atol=0.003)


@pytest.mark.parametrize("exact", [True, False])
def test_whisper_returns_word_times(exact, tmp_path):
    heard = Whisper(str(save_whisper(tmp_path / "whisper", exact=exact))).words(0.1 * draw(22050), 22050)
    assert heard and all(word and 0 <= start <= end <= 1 for word, start, end in heard)


def test_whisper_is_loaded_from_a_folder(tmp_path):
    heard = Whisper(str(save_whisper(tmp_path / "whisper")))(0.1 * draw(22050), 22050)
    assert isinstance(heard, str)
    with pytest.raises(ValueError, match="is not a Whisper model"):
        Whisper(str(tmp_path))


def test_feature_networks_are_loaded_from_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    from mfcore.metrics.feature_extractors import CLAP, FaceEncoder, VideoMAE

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    video = transformers.VideoMAEConfig(image_size=32, num_frames=4, **small)
    transformers.VideoMAEModel(video).save_pretrained(tmp_path / "videomae")
    transformers.ViTModel(transformers.ViTConfig(image_size=32, **small)).save_pretrained(tmp_path / "faces")
    frames = np.random.default_rng(0).integers(0, 256, (97, 40, 48, 3), np.uint8)
    features = VideoMAE(str(tmp_path / "videomae"))(frames, 24.0)
    assert features.shape == (2, 16) and not np.allclose(features[0], features[1])
    assert VideoMAE(str(tmp_path / "videomae"))(frames[:10], 24.0).shape == (1, 16)
    assert FaceEncoder(str(tmp_path / "faces"))(frames, 24.0).shape == (3, 16)  # the first frame, two segments
    with pytest.raises(ValueError, match="none is not a folder"):
        VideoMAE(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="ClapModel"):
        CLAP(str(tmp_path))


def test_clap_is_loaded_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from mfcore.metrics.feature_extractors import CLAP

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    audio = {"depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16}
    torch.manual_seed(0)
    config = transformers.ClapConfig(
        text_config={**text, "vocab_size": 50}, audio_config={**audio, "num_hidden_layers": 2}, projection_dim=12
    )
    transformers.ClapModel(config).save_pretrained(tmp_path)
    transformers.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path)
    features = CLAP(str(tmp_path))(0.1 * draw(4 * 16000), 16000)
    assert features.shape == (2, 12)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_sound_classifier_is_loaded_from_a_folder(tmp_path):
    """Loud and quiet noise differ in classes; two seconds of the same noise are similar."""
    transformers = pytest.importorskip("transformers")
    from mfcore.metrics.feature_extractors import AudioClassifier

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.ASTConfig(max_length=220, num_mel_bins=32, num_labels=5, **small)
    transformers.ASTForAudioClassification(config).save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=220, num_mel_bins=32).save_pretrained(tmp_path)
    heard = AudioClassifier(str(tmp_path))
    loud, quiet = (heard(gain * draw(4 * 22050), 22050) for gain in (0.3, 0.001))
    assert loud.shape == quiet.shape == (2, 5)
    assert loud.sum(1) == pytest.approx(1, abs=1e-5)
    assert heard(np.zeros(0), 22050).shape == (0, 5)
    assert kl_divergence(loud.mean(0), quiet.mean(0)) > 10 * kl_divergence(loud[0], loud[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="AutoModelForAudioClassification"):
        AudioClassifier(str(tmp_path / "empty"))
