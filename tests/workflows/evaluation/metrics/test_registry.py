"""Test the scores of clips with known properties. See ``test_monotonicity`` for degraded clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mfcore.metrics.windows import TimeWindow
from mfcore.types import AUDIO, VIDEO
from preprocessing.records import Word
from tests.helpers.toyworld_clips import WORLD, evaluation_set, real_clip
from workflows.evaluation.feature_models import FeatureModels
from workflows.evaluation.feature_reader import FeatureExtractor, split_speech
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.metrics.registry import compute_metrics

READER = FeatureExtractor(evaluation_set())


def read(clips):
    return [READER.extract(clip) for clip in clips]


@pytest.fixture(scope="module")
def clips():
    return [real_clip(i) for i in range(6)]


@pytest.fixture(scope="module")
def real(clips):
    others = [real_clip(i) for i in range(20, 32)]
    return ReferenceFeatures(prompts=read(clips), reference=read(others))


@pytest.fixture(scope="module")
def perfect(real):
    return compute_metrics(real.prompts, real).metrics


def test_real_clips_get_perfect_scores(perfect):
    assert perfect["sync"] > 0.95
    assert perfect["sync_offset_s"] < 0.005
    assert perfect["syllable_error"] < 0.02
    assert perfect["identity_error"] < 0.01
    assert perfect["valid"] == 1
    assert perfect["entropy"] == 1
    assert perfect["entropy_within"] == 1
    assert perfect["failed"] == 0
    for name in ("seam", "seam_pixels", "seam_sound", "seam_video_latents", "seam_audio_latents"):
        assert perfect[name] == pytest.approx(1)
    assert perfect["lag1_hand"] == pytest.approx(0.6, abs=0.25)  # 0.7 stays, of 4 modes: (0.7 - 0.1)
    assert perfect["lag1_pose"] > 0.7


def test_late_audio_is_detected_and_lowers_sync(clips, real, perfect):
    delay = int(0.12 * WORLD.sample_rate)
    late = [replace(c, sound=torch.cat([torch.zeros(delay), c.sound[:-delay]])) for c in clips]
    found = compute_metrics(read(late), real).metrics
    assert found["sync_offset_s"] == pytest.approx(0.12, abs=0.01)
    assert found["sync"] < perfect["sync"] - 0.5
    assert found["syllable_error"] < 0.05  # it is still the same speech


def test_audio_of_another_clip_lowers_sync_and_raises_syllable_error(clips, real):
    swapped = [replace(c, sound=clips[i - 1].sound) for i, c in enumerate(clips)]
    found = compute_metrics(read(swapped), real).metrics
    assert found["sync"] < 0.4
    assert found["syllable_error"] > 0.6
    assert found["valid"] == 1


def test_shuffled_audio_is_in_sync_only_by_chance(clips, real):
    """Combine every clip with the audio of every other clip: only chance correlation remains."""
    orders = [[replace(c, sound=clips[i - k].sound) for i, c in enumerate(clips)] for k in range(1, len(clips))]
    found = [compute_metrics(read(order), real) for order in orders]
    assert abs(np.mean([f.metrics["sync"] for f in found])) < 0.2
    assert np.mean([f.metrics["sync_within_80ms"] for f in found]) < 0.55  # 0.16 of 0.8 s, and peaks at the middle


def test_every_metric_has_counts_failures_and_interval(clips, real):
    silent = replace(clips[0], sound=torch.zeros_like(clips[0].sound))
    found = compute_metrics(read([silent, *clips[1:]]), real).found
    assert (found["sync"].count, found["sync"].failed) == (len(clips), 1)
    assert (found["syllable_error"].count, found["syllable_error"].failed) == (len(clips), 1)
    assert (found["identity_error"].failed, found["failed"].value) == (0, 1)
    for name in ("sync", "syllable_error", "identity_error", "frechet", "loudness_db"):
        one = found[name]
        assert one.low is not None and one.high is not None
        assert one.low <= one.value <= one.high
    assert found["frechet_bias"].value > 0


def test_speech_is_transcribed_in_segments_within_windows(clips):
    """Use a recognizer that detects loudness: segments are cut between words and cover the clip."""
    spoken = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot"]
    spoken += ["golf", "hotel", "india", "juliet", "kilo", "lima"]
    words = tuple(Word(word=word, start=i + 0.1, end=i + 0.8) for i, word in enumerate(spoken))
    pieces = split_speech(words, 12.0)
    assert pieces[0][0] == 0 and pieces[-1][1] == 12.0
    assert all(not any(w.start < end < w.end for w in words) for _, end in pieces)

    class Deaf(FeatureModels):
        speech_recognizers = {"whisper": lambda sound, rate: "" if abs(sound).max() < 0.01 else " ".join(spoken[:5])}  # noqa: RUF012

    reader = FeatureExtractor(evaluation_set(toy=None), Deaf())
    sound = torch.cat([0.1 * torch.ones(5 * 16000), torch.zeros(7 * 16000)])
    part = [reader.extract(replace(clips[0], sound=sound, words=words, frames=clips[0].frames))]
    whole = compute_metrics(part, ReferenceFeatures(prompts=part, reference=part))
    assert whole.metrics["wer"] == pytest.approx(7 / 12)
    assert whole.not_measured["wer_pocketsphinx"].startswith("not measured: needs --weights pocketsphinx=")
    first = compute_metrics(
        [r.crop(TimeWindow(start=0, end=5)) for r in part], ReferenceFeatures(prompts=part, reference=part)
    )
    assert first.metrics["wer"] == 0


def test_chunks_of_other_clips_lower_persistence(clips, real, perfect):
    """Take each half second from another clip: every chunk is real, but nothing persists."""
    n = len(clips)
    chunk = lambda i, k: clips[(i + k) % n].frames[1 + 12 * k : 13 + 12 * k]
    hybrid = [
        replace(c, frames=torch.cat([c.frames[:1], *(chunk(i, k) for k in range(8))])) for i, c in enumerate(clips)
    ]
    found = compute_metrics(read(hybrid), real).metrics
    assert found["seam_pixels"] > 3
    assert found["lag1_hand"] < perfect["lag1_hand"] - 0.3
    assert found["identity_error"] > 10 * perfect["identity_error"]


def test_constant_gesture_is_valid_without_entropy(clips, real):
    still = [replace(c, frames=c.frames[:1].expand(97, -1, -1, -1).contiguous()) for c in clips]
    found = compute_metrics(read(still), real)
    assert found.metrics["entropy_within"] < 0.35  # the tone of the voice is still free
    assert found.metrics["lag1_hand"] == 1
    assert found.metrics["valid"] > 0.9
    assert found.failures["no_mouth"] == len(clips)
    assert found.metrics["sync"] == -1


def test_failed_clip_gets_worst_score_and_is_counted(clips, real, perfect):
    silent = replace(clips[0], sound=torch.zeros_like(clips[0].sound))
    broken = replace(clips[1], finite=False)
    found = compute_metrics(read([silent, broken, *clips[2:]]), real)
    assert found.failures == {"not_finite": 1, "silent": 1, "nothing_said": 1, "no_mouth": 0}
    assert found.metrics["failed"] == 2
    assert found.metrics["sync"] == pytest.approx((4 * perfect["sync"] - 2) / 6, abs=0.02)
    assert found.metrics["sync_offset_s"] > 0.4 * 2 / 6
    assert found.metrics["syllable_error"] > 0.3
    assert found.metrics["identity_error"] > 1 / 6
    assert found.metrics["valid"] == pytest.approx(5 / 6)


def test_non_finite_clips_are_scored(clips, real):
    grey = [
        replace(c, frames=torch.full_like(c.frames, 127), sound=torch.zeros_like(c.sound), finite=False) for c in clips
    ]
    found = compute_metrics(read(grey), real).metrics
    assert found["failed"] == len(clips)
    assert (found["sync"], found["syllable_error"], found["valid"]) == (-1, 1, 0)
    assert all(np.isfinite(list(found.values())))


def test_missing_modality_is_reported_as_requirement(clips, real):
    videos = [replace(c, sound=None, latents={VIDEO: c.latents[VIDEO]}) for c in clips]
    found = compute_metrics(read(videos), real)
    assert found.not_measured["sync"] == "not measured: needs a checkpoint that generates audio"
    assert found.not_measured["seam_sound"] == "not measured: needs a checkpoint that generates audio"
    assert {"identity_error", "valid", "entropy", "frechet", "seam_pixels", "lag1"} <= found.metrics.keys()
    sounds = [replace(c, frames=None, latents={AUDIO: c.latents[AUDIO]}) for c in clips]
    found = compute_metrics(read(sounds), real)
    assert found.not_measured["identity_error"] == "not measured: needs a checkpoint that generates video"
    assert {"syllable_error", "valid", "frechet", "seam_sound", "loudness_db"} <= found.metrics.keys()
    assert not found.metrics.keys() & found.not_measured.keys()


def test_other_datasets_are_scored_without_toy_readers(clips):
    reader = FeatureExtractor(evaluation_set(toy=None))
    part = [reader.extract(clip) for clip in clips]
    found = compute_metrics(part, ReferenceFeatures(prompts=part, reference=part))
    assert "needs a toy world dataset" in found.not_measured["syllable_error"]
    assert {"motion_sync", "seam", "loudness_db", "motion"} <= found.metrics.keys()


def test_window_uses_only_its_time_range(clips, real):
    """Stop the audio after two seconds: the first window is perfect and the second is silent."""
    cut = [replace(c, sound=c.sound * (torch.arange(len(c.sound)) < 2 * WORLD.sample_rate)) for c in clips]
    part = read(cut)
    first, second = (compute_metrics([r.crop(TimeWindow(start=a, end=a + 2)) for r in part], real) for a in (0, 2))
    assert first.metrics["syllable_error"] < 0.2  # syllables on the border are cut in two
    assert first.failures["silent"] == 0
    assert second.metrics["syllable_error"] == 1
    assert second.failures["silent"] == len(clips)
    assert second.metrics["sync"] == -1
