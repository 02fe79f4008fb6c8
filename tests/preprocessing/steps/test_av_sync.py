"""A/V offsets are recorded, filtered and corrected without padding."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from mfcore.metrics.av_sync import SyncResult
from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders, span_plan
from preprocessing.records import Clip, Rejected, Source, Word
from preprocessing.sources.discovery import find_sources
from preprocessing.sources.sidecar import attach_text
from preprocessing.steps import av_sync
from preprocessing.steps.av_sync import SyncConfig, check_sync, shift_audio, syncnet_config
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.source_processing import process_source
from tests.helpers.tiny_syncnet import published
from workflows.data.codec_options import apply_sync_option

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(3))
PLAN = span_plan(CONFIG, build_encoders(CONFIG).timeline)
STRICT = SyncConfig(estimator="motion", min_confidence=2.0, max_offset=0.24, shift=True)


def clip(chunks: int = 6) -> Clip:
    """Frame j has the level j, sample i the value i."""
    frames = (
        np.zeros((PLAN.frames[chunks], 64, 64, 3), np.uint8)
        + np.arange(PLAN.frames[chunks], dtype=np.uint8)[:, None, None, None]
    )
    words = (Word(word="ba", start=4.0, end=4.2),)
    source = Source(uri="file:///x", size=1, fingerprint="", transcript=words)
    return Clip(
        source=source, span=(3.0, 6.05), frames=frames, waveform=np.arange(PLAN.samples[chunks], dtype=np.float32)
    )


def set_estimate(monkeypatch, offset: float, confidence: float) -> None:
    monkeypatch.setattr(av_sync, "build_estimator", lambda _: lambda *_: SyncResult(offset, confidence))


def test_toy_clips_have_offset_zero(tmp_path):
    (path,) = write_toyworld(tmp_path / "toy", clips=1, seconds=3.1, jobs=1)
    (source,) = find_sources([str(path)])
    (found,) = process_source(source, CONFIG, build_encoders(CONFIG))
    assert isinstance(found, Clip)
    assert found.sync is not None
    assert found.sync[0] == pytest.approx(0, abs=0.02)
    assert found.sync[1] > 1.05
    (plain,) = process_source(source, apply_sync_option(CONFIG, "off"), build_encoders(CONFIG))
    assert plain.sync is None


def test_thresholds_reject_with_a_reason(monkeypatch):
    for offset, confidence, reason in ((0.0, 1.9, "unsure"), (0.25, 5.0, "out_of_sync"), (-0.25, 5.0, "out_of_sync")):
        set_estimate(monkeypatch, offset, confidence)
        with pytest.raises(Rejected) as error:
            check_sync(clip(), STRICT, PLAN, fps=Fraction(24), sample_rate=16000)
        assert (error.value.step, error.value.reason) == ("sync", reason)
    set_estimate(monkeypatch, 0.3, 0.1)
    kept = check_sync(clip(), SyncConfig(), PLAN, fps=Fraction(24), sample_rate=16000)  # recorded only
    assert kept.sync == (0.3, 0.1)
    assert kept.waveform[0] == 0


@pytest.mark.parametrize("late", [0.24, 0.1, -0.1, -0.24])
def test_moved_audio_matches_the_video_without_padding(monkeypatch, late):
    set_estimate(monkeypatch, late, 3.0)
    before = clip()
    after = check_sync(before, STRICT, PLAN, fps=Fraction(24), sample_rate=16000)
    assert after.sync == (0.0, 3.0)
    assert (len(after.frames), len(after.waveform)) == (PLAN.frames[5], PLAN.samples[5])
    first = int(after.frames[0, 0, 0, 0])  # frame of the source clip, at first / 24 seconds
    assert after.waveform[0] / 16000 == pytest.approx(first / 24 + late, abs=1e-4)
    assert after.waveform[-1] > 0
    assert after.span[0] == pytest.approx(3.0 + first / 24, abs=1e-6)
    word = attach_text(after).transcript[0]
    assert word.start + after.span[0] == pytest.approx(4.0 - late, abs=1e-6)  # words move with the audio


def test_too_short_clips_after_moving_are_rejected():
    with pytest.raises(Rejected, match="too_short"):
        shift_audio(clip(2), 0.2, PLAN, fps=Fraction(24), sample_rate=16000)


def test_syncnet_is_identified_by_the_content_of_its_file(tmp_path):
    torch.save(published(), tmp_path / "syncnet_v2.model")
    config = syncnet_config(str(tmp_path / "syncnet_v2.model"))
    assert (config.min_confidence, config.max_offset, config.shift) == (3.0, 0.24, True)
    assert av_sync.build_estimator(config) is not None
    (tmp_path / "syncnet_v2.model").rename(tmp_path / "moved")
    elsewhere = syncnet_config(str(tmp_path / "moved"))
    one, other = replace(CONFIG, sync=config), replace(CONFIG, sync=elsewhere)
    assert one.fingerprint == other.fingerprint != CONFIG.fingerprint
    torch.save(published(seed=1), tmp_path / "moved")
    av_sync.build_estimator.cache_clear()
    with pytest.raises(ValueError, match="other weights"):
        build_encoders(other)


def test_invalid_settings_raise(tmp_path):
    for wrong in ("syncnet", "lips", "syncnet:"):
        with pytest.raises(ValueError, match="choose motion"):
            apply_sync_option(CONFIG, wrong)
    with pytest.raises(ValueError, match="cannot read.*Name the checkpoint file"):
        apply_sync_option(CONFIG, f"syncnet:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="--sync syncnet:FILE"):
        SyncConfig(estimator="syncnet")
    with pytest.raises(ValueError, match="min_confidence"):
        SyncConfig(shift=True)
