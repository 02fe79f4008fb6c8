"""Metrics of people for tracks with known faces, blinks and voices, and on real clips if they are there."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mfcore.metrics.av_sync import block_statistics
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import probe
from tests.preprocessing.people.test_speech import needs_models
from workflows.evaluation.clip_features import ClipFeatures, FeatureTrack
from workflows.evaluation.feature_models import parse_feature_models
from workflows.evaluation.metrics import people
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.metrics.registry import compute_metrics

FPS, FRAMES = 25.0, 250
BLOCKS = block_statistics(np.random.default_rng(0).integers(0, 255, (FRAMES, 16, 16, 3), dtype=np.uint8))
MEDIA = Path(__file__).parents[5] / "shared" / "media" / "talking"


def _face(found=1.0, *, step=0.0, blinks=()):
    """Return a face track with ``found`` of the frames, a zigzag of ``step`` pixels, and closed eyes at ``blinks``."""
    values = np.tile([1.0, 100.0, 80.0, 50.0, 0.3], (FRAMES, 1))
    values[1::2, 1] += step
    for at in blinks:
        values[at : at + 4, 4] = 0.05
    values[round(found * FRAMES) :] = 0
    return FeatureTrack(values=values, rate=FPS)


def _clip(voice=None, quality=(3.0,), **face):
    sound = np.sin(np.arange(16000 * 10) / 5).astype(np.float32)
    rows = np.zeros((10, 4)) if voice is None else np.tile(np.asarray(voice, float), (10, 1))
    tracks = {
        "face": _face(**face),
        "quality": FeatureTrack(values=np.array([[q] for q in quality]), rate=1 / 3),
        "speaker": FeatureTrack(values=rows, rate=1 / 0.8),
    }
    return ClipFeatures(
        finite=True,
        fps=FPS,
        sample_rate=16000,
        motion=np.ones(FRAMES),
        sharpness=np.ones(FRAMES),
        blocks=BLOCKS,
        sound=sound,
        seams={},
        features={},
        picture=None,
        speech=None,
        tracks=tracks,
    )


def test_face_metrics():
    found = people.face_metrics([_clip(), _clip(found=0.5, step=4.0)])
    assert found["face_found"].value == pytest.approx(0.75)
    assert found["face_jitter"].value == pytest.approx((0 + 8 / 50) / 2)  # second difference of the zigzag
    assert people.face_metrics([_clip(found=0.0)])["face_jitter"].value == 1.0


def test_blinks_are_counted_by_length():
    assert people.face_metrics([_clip(blinks=(50, 120, 200))])["blinks_per_minute"].value == pytest.approx(18)
    closed = people.face_metrics([_clip(blinks=tuple(range(50, 90, 2)))])  # closed for 1.7 s: no blink
    assert closed["blinks_per_minute"].value == 0
    short = people.face_metrics([_clip(found=0.1, blinks=(5,))])["blinks_per_minute"]
    assert (short.value, short.failed) == (0, 1)  # one second of a face


def test_voices_are_compared_with_the_clip_of_the_prompt():
    real = [_clip(voice=(1, 0, 0, 0)), _clip(voice=(0, 1, 0, 0))]
    ours = [_clip(voice=(1, 0, 0, 0)), _clip(voice=(0, 1, 1, 0))]
    reference = ReferenceFeatures(prompts=real, reference=real)
    similarity = people.speaker_similarity(ours, reference)["speaker_similarity"]
    assert similarity.value == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert people.speaker_similarity(ours[:1], reference) == {}


def test_quality_is_the_mean_over_parts():
    assert people.speech_quality_metrics([_clip(quality=(2.0, 4.0))])["speech_quality"].value == 3.0


def test_registry_names_the_option_of_a_missing_model():
    clips = [_clip(voice=(1, 0, 0, 0)) for _ in range(2)]
    reference = ReferenceFeatures(prompts=clips, reference=clips)
    assert compute_metrics(clips, reference).metrics["speaker_similarity"] == pytest.approx(1)
    bare = [replace(clip, tracks={}) for clip in clips]
    missing = compute_metrics(bare, ReferenceFeatures(prompts=bare, reference=bare)).not_measured
    for name in ("face_found", "blinks_per_minute", "speech_quality", "speaker_similarity"):
        assert missing[name] == "not measured: needs --weights people=... (packages, with the extra: make people)"


def test_other_places_of_the_models_are_refused():
    with pytest.raises(ValueError, match="make people"):
        parse_feature_models(["people=folder"])


@pytest.mark.slow
@needs_models
@pytest.mark.skipif(not MEDIA.is_dir(), reason="real clips are not here")
def test_real_clips():
    models = parse_feature_models(["people=packages"]).people_models
    found = {}
    for name in ("grid_bbaf2n.mpg", "webav_aigen_vp9_opus.webm"):
        info = probe(str(MEDIA / name))
        size = (info.video.height, info.video.width)
        with Decoder(str(MEDIA / name), info, fps=Fraction(25), size=size, sample_rate=16000) as decoder:
            frames, sound = decoder.read(60)
        tracks = found[name] = models.tracks(frames, 25.0, sound, 16000)
        assert tracks["face"].values[:, 0].mean() == 1.0
        assert 2.0 < tracks["quality"].values.mean() < 4.5
    jitter = [people._jitter(replace(_clip(), tracks=tracks)) for tracks in found.values()]
    assert max(jitter) < 0.02
