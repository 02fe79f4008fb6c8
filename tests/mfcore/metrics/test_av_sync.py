"""A/V offset: planted offsets are found on talking heads, unrelated sound gives no confidence; SyncNet."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfcore.metrics.av_sync import MotionSync
from mfcore.metrics.syncnet import SyncNet, SyncNetSync, best_offset, face_windows, load_syncnet, mfcc
from preprocessing.toyworld.world import ToyConfig, render_audio, render_frames, sample_truth
from tests.helpers.tiny_syncnet import PUBLISHED, published

CONFIG = ToyConfig(seconds=6.0, seed=11)


@cache
def talking(index: int) -> tuple[np.ndarray, np.ndarray]:
    truth = sample_truth(CONFIG, index)
    return render_frames(truth), render_audio(truth)


def delay(sound: np.ndarray, seconds: float) -> np.ndarray:
    """Return the sound delayed by ``seconds``, padded with silence; earlier if negative."""
    n = round(abs(seconds) * 16000)
    quiet = np.zeros(n, sound.dtype)
    return np.concatenate([quiet, sound[: len(sound) - n]] if seconds > 0 else [sound[n:], quiet])


@pytest.mark.parametrize("planted", [-0.4, -0.237, -0.08, 0.0, 0.1, 0.31, 0.4])
def test_planted_offsets_are_found(planted):
    for index in range(3):
        frames, sound = talking(index)
        found = MotionSync()(frames, 24, delay(sound, planted), 16000)
        assert found.offset_sec == pytest.approx(planted, abs=0.02)  # half a frame; measured: 5 ms
        assert found.confidence > 1.25


def test_unrelated_sound_gives_no_confidence():
    strangers = [MotionSync()(talking(i)[0], 24, talking(j)[1], 16000) for i in range(4) for j in range(4) if i != j]
    own = [MotionSync()(*_pair(i)) for i in range(4)]
    assert np.median([s.confidence for s in strangers]) < 1.0
    assert max(s.confidence for s in strangers) < min(o.confidence for o in own)
    noise = np.random.default_rng(0).standard_normal(6 * 16000).astype(np.float32)
    assert MotionSync()(talking(0)[0], 24, noise, 16000).confidence < 1.2


def _pair(index: int) -> tuple[np.ndarray, float, np.ndarray, int]:
    frames, sound = talking(index)
    return frames, 24, sound, 16000


def test_confidence_is_zero_without_evidence():
    frames, sound = talking(0)
    static, silence = np.repeat(frames[:1], len(frames), 0), np.zeros_like(sound)
    for f, s in ((static, sound), (frames, silence), (frames[:10], sound[:6000]), (frames[:0], sound[:0])):
        assert MotionSync()(f, 24, s, 16000) == (0.0, 0.0)


def test_any_size_and_rate():
    frames, sound = talking(1)
    wide = frames.repeat(2, axis=2)[:, :, :117]
    assert MotionSync()(wide, 24, sound, 16000).offset_sec == pytest.approx(0, abs=0.02)
    assert MotionSync()(frames[::2], 12, sound[::2], 8000).offset_sec == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("counters", [True, False])
def test_the_published_checkpoint_loads_name_by_name(tmp_path, counters):
    tensors = published(counters=counters)
    torch.save(tensors, tmp_path / "syncnet_v2.model")
    save_file(tensors, tmp_path / "syncnet.safetensors")
    for file in ("syncnet_v2.model", "syncnet.safetensors"):
        loaded = load_syncnet(tmp_path / file).state_dict()
        assert {n for n in loaded if not n.endswith("num_batches_tracked")} == PUBLISHED.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in PUBLISHED)


def test_other_files_are_rejected(tmp_path):
    (tmp_path / "text").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "others")
    wrong = published()
    wrong["netfclip.3.weight"] = torch.zeros(256, 512)
    torch.save(wrong, tmp_path / "shape")
    torch.save(Path("code"), tmp_path / "pickle")  # an object, not tensors: it is not unpickled
    for file, message in (
        ("text", "read"),
        ("none", "read"),
        ("others", "missing"),
        ("shape", "netfclip.3"),
        ("pickle", "read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_syncnet(tmp_path / file)


def test_windows_and_towers_have_the_published_shapes():
    faces = face_windows(np.zeros((24, 48, 64, 3), np.uint8), 24)
    assert faces.shape == (21, 3, 5, 224, 224)
    network = SyncNet().eval()
    assert network.lips(faces[:1]).shape == network.sound(torch.zeros(1, 1, 13, 20)).shape == (1, 1024)
    blue = np.zeros((5, 8, 8, 3), np.uint8)
    blue[..., 2] = 200
    assert face_windows(blue, 25)[0, :, 0, 0, 0].tolist() == [200, 0, 0]


def test_cepstra_of_a_tone_and_of_silence():
    times = np.arange(16000) / 16000
    tone = mfcc(0.1 * np.sin(2 * np.pi * 1000 * times))
    assert tone.shape == (99, 13)
    louder = mfcc(0.2 * np.sin(2 * np.pi * 1000 * times))
    assert np.allclose(louder[5:-5, 0] - tone[5:-5, 0], np.log(4), atol=0.01)  # energy
    assert np.allclose(louder[5:-5, 2:], tone[5:-5, 2:], atol=0.3)  # shape
    assert np.isfinite(mfcc(np.zeros(1600))).all()
    assert len(mfcc(np.zeros(0))) == 0


@pytest.mark.parametrize("planted", [-9, -1, 0, 4, 15])
def test_the_offset_is_the_shift_of_equal_vectors(planted):
    vectors = torch.randn(120, 64, generator=torch.Generator().manual_seed(1))
    lips, audio = vectors[20:100], vectors[20 - planted : 100 - planted]  # audio is late by ``planted``
    found = best_offset(lips, audio)
    assert found.offset_sec == planted / 25
    assert found.confidence > 3
    assert best_offset(lips, torch.randn(80, 64)).confidence < 1


@pytest.mark.slow
def test_syncnet_reads_a_clip_end_to_end(tmp_path):
    """Random weights, so only shapes and finiteness are checked."""
    torch.save(published(), tmp_path / "syncnet_v2.model")
    frames, sound = talking(0)
    found = SyncNetSync(load_syncnet(tmp_path / "syncnet_v2.model"))(frames[:48], 24, sound[:32000], 16000)
    assert np.isfinite(found).all()
    assert SyncNetSync(load_syncnet(tmp_path / "syncnet_v2.model"))(frames[:3], 24, sound[:2000], 16000) == (0, 0)
