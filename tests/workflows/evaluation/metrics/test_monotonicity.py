"""Test that every metric changes monotonically with noise, blur, desync, drift and other degradations.

Plain functions of frames and audio replace the pretrained networks.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from mfcore.metrics.av_sync import sound_envelope
from mfcore.types import AUDIO, VIDEO
from preprocessing.records import Word
from tests.helpers.toyworld_clips import AUDIO_CODEC, META, WORLD, evaluation_set, real_clip
from workflows.evaluation.feature_models import FeatureModels
from workflows.evaluation.feature_reader import FeatureExtractor
from workflows.evaluation.metrics.generic import ReferenceFeatures
from workflows.evaluation.metrics.registry import METRICS
from workflows.evaluation.signals import DecodedClip

CHUNKS, FRAMES, RATE = 8, 97, WORLD.sample_rate
ODD_FRAME = (torch.arange(FRAMES) - 1).clamp(min=0) // 12 % 2
NOISE = torch.Generator().manual_seed(0)
GREY = torch.randn(FRAMES, 64, 64, 3, generator=NOISE)
HISS = torch.randn(4 * RATE, generator=NOISE)


def noise(c: DecodedClip, by: float, i: int) -> DecodedClip:
    return replace(c, frames=(c.frames + by * GREY).clamp(0, 255).byte())


def hiss(c: DecodedClip, by: float, i: int) -> DecodedClip:
    return replace(c, sound=c.sound + by * HISS)


def blur(c: DecodedClip, by: float, i: int) -> DecodedClip:
    return replace(c, frames=torch.from_numpy(gaussian_filter(c.frames.float().numpy(), (0, by, by, 0))).byte())


def desync(c: DecodedClip, by: float, i: int) -> DecodedClip:
    n = int(by * RATE)
    return replace(c, sound=torch.cat([torch.zeros(n), c.sound[: len(c.sound) - n]]))


def jitter(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Shift every clip by another amount, half of them early."""
    by *= 1 + i // 2
    n = int(by * RATE)
    return desync(c, by, i) if i % 2 else replace(c, sound=torch.cat([c.sound[n:], torch.zeros(n)]))


def drift(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Drift away from the colors of the first frame."""
    walk = by * torch.linspace(0, 1, FRAMES)[:, None, None, None] * torch.tensor([1.0, -1.0, 0.0])
    return replace(c, frames=(c.frames + walk).clamp(0, 255).byte())


def jumps(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Brighten every second chunk, make it louder and shift its latents."""
    loud = 1 + by * (torch.arange(len(c.sound)) // (RATE // 2) % 2)
    latents = {}
    for m, x in c.latents.items():
        odd = META.timeline().chunk_index(m, CHUNKS)[: len(x)] % 2
        latents[m] = x + 3 * by * x.std() * odd.reshape(-1, *(1,) * (x.ndim - 1))
    frames = (c.frames + 40 * by * ODD_FRAME[:, None, None, None]).clamp(0, 255).byte()
    return replace(c, frames=frames, sound=c.sound * loud, latents=latents)


def frozen(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Show the first frame for a share ``by`` of the clip."""
    still = round(by * FRAMES)
    return replace(c, frames=torch.cat([c.frames[:1].expand(still, -1, -1, -1), c.frames[still:]]))


def scrambled(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Take a share ``by`` of the half seconds from other clips."""
    swap = [k for k in range(CHUNKS) if (k * 3) % CHUNKS < by * CHUNKS]
    frames = c.frames.clone()
    for k in swap:
        frames[1 + 12 * k : 13 + 12 * k] = CLIPS[(i + k + 1) % len(CLIPS)].frames[1 + 12 * k : 13 + 12 * k]
    return replace(c, frames=frames)


def muted(c: DecodedClip, by: float, i: int) -> DecodedClip:
    """Silence the first share ``by`` of the clip."""
    return replace(c, sound=c.sound * (torch.arange(len(c.sound)) >= by * len(c.sound)))


def quieter(c: DecodedClip, by: float, i: int) -> DecodedClip:
    return replace(c, sound=c.sound * 10**-by)


def louder(c: DecodedClip, by: float, i: int) -> DecodedClip:
    return replace(c, sound=(c.sound * 10**by).clamp(-1, 1))


UP, DOWN = 1, -1
DEGRADATIONS = (
    (noise, (40, 120), {"frechet": UP, "identity_error": UP, "motion": UP, "valid": DOWN, "frechet_videomae": UP}),
    (noise, (10, 40), {"sharpness": UP, "sharpness_over_real": UP, "motion_over_real": UP}),
    (
        hiss,
        (0.3, 1.0),
        {"sync": DOWN, "motion_sync": DOWN, "syllable_error": UP, "frechet_clap": UP, "sound_kl": UP}
        | {"lse_c": DOWN, "lse_d": UP},
    ),
    (blur, (1.0, 3.0), {"sharpness": DOWN, "sharpness_over_real": DOWN, "frechet": UP}),
    (blur, (1.2, 3.0), {"valid": DOWN}),
    (
        desync,
        (0.04, 0.08, 0.16),
        {"sync": DOWN, "sync_offset_s": UP, "sync_offset_median_s": UP, "lse_offset_s": UP, "motion_sync_offset_s": UP},
    ),
    (jitter, (0.05, 0.1), {"sync_offset_spread_s": UP, "sync_within_80ms": DOWN, "sync": DOWN}),
    (drift, (20, 60), {"identity_error": UP, "frechet": UP, "frechet_videomae": UP, "face_similarity": DOWN}),
    (
        jumps,
        (0.5, 1.5),
        dict.fromkeys(
            [
                f"seam_{kind}{raw}"
                for kind in ("pixels", "sound", "video_latents", "audio_latents")
                for raw in ("", "_raw")
            ]
            + ["seam"],
            UP,
        ),
    ),
    (frozen, (0.4, 0.8), {"motion": DOWN, "motion_over_real": DOWN, "entropy_within": DOWN, "sync": DOWN}),
    (frozen, (0.6, 1.0), {"entropy": DOWN, "choice_kl": UP}),
    (scrambled, (0.5, 1.0), {"lag1": DOWN, "lag1_hand": DOWN, "lag1_light": DOWN, "lag1_pose": DOWN}),
    (muted, (0.3, 0.6), {"silence": UP, "syllable_error": UP, "sync": DOWN}),
    (muted, (0.3, 0.6), {"wer": UP, "cer": UP, "wer_pocketsphinx": UP, "cer_pocketsphinx": UP}),
    (quieter, (0.5, 1.0), {"loudness_db": DOWN}),
    (louder, (0.7, 1.2), {"clipping": UP, "loudness_db": UP}),
)
ELSEWHERE = {
    *("viseme_sync", "phoneme_accuracy"),  # need the English voice: test_toyworld.py
    *("face_found", "face_jitter", "blinks_per_minute", "speech_quality", "speaker_similarity"),  # test_people.py
}
ESTIMATE_SUFFIXES = ("_bias", "_n", "_n_real", "_shrinkage")  # properties of the estimate, not of the clips

CLIPS = [real_clip(i) for i in range(3)]


def grid(frames, fps):
    """Return colors and contrasts of a coarse grid, per two seconds."""
    parts = [p.astype(float).reshape(len(p), 2, 32, 2, 32, 3) for p in np.array_split(frames, 2)]
    return np.stack([np.concatenate([p.mean((0, 2, 4)).ravel(), p.std((0, 2, 4)).ravel()]) for p in parts])


def face(frames, fps):
    patches = [frames[:1], *np.array_split(frames, 2)]
    return np.stack([p[:, 24:48, 20:44].astype(float).mean((0, 1, 2)) - 128 for p in patches])


def bands(sound, rate):
    power = [np.abs(np.fft.rfft(p)) ** 2 for p in np.array_split(sound.astype(float), 2)]
    return np.log10(1e-3 + np.stack([[b.mean() for b in np.array_split(p[: len(p) // 2], 6)] for p in power]))


def classes(sound, rate):
    strength = 10 ** bands(sound, rate)
    return strength / strength.sum(1, keepdims=True)


def lip_embeddings(frames, fps, sound, rate):
    """Return the darkness of the mouth and the loudness, over five frames each."""
    times = np.arange(int(len(sound) / rate * 25)) / 25
    dark = np.interp(times, np.arange(len(frames)) / fps, -frames[:, 44:54, 26:38].mean((1, 2, 3)))
    loud = sound_envelope(sound, rate, 25.0)[: len(times)]
    return tuple(np.lib.stride_tricks.sliding_window_view((x - x.mean()) / (x.std() + 1e-9), 5) for x in (dark, loud))


def transcribe(sound, rate):
    """Return a word for every audible half second."""
    return " ".join(f"w{k}" for k, p in enumerate(np.array_split(sound, 8)) if np.abs(p).max() > 1e-3)


class FakeFeatureModels(FeatureModels):
    video_encoders = {"videomae": grid, "faces": face}  # noqa: RUF012
    audio_encoders = {"clap": bands, "sounds": classes}  # noqa: RUF012
    lip_sync_model = staticmethod(lip_embeddings)
    speech_recognizers = {"whisper": transcribe, "pocketsphinx": transcribe}  # noqa: RUF012


WORDS = tuple(Word(word=f"w{k}", start=k / 2, end=k / 2 + 0.4) for k in range(CHUNKS))
TOY, OTHER = (
    FeatureExtractor(evaluation_set(), FakeFeatureModels()),
    FeatureExtractor(evaluation_set(toy=None), FakeFeatureModels()),
)
SPEECH_METRICS = {name for name in (n for m in METRICS for n in m.names) if name.startswith(("wer", "cer"))}


def extract(clips, names):
    if SPEECH_METRICS & set(names):
        return [OTHER.extract(replace(c, frames=None, latents={}, words=WORDS)) for c in clips]
    return [TOY.extract(c) for c in clips]


@pytest.fixture(scope="module")
def real() -> ReferenceFeatures:
    """Use the undegraded clips as reference, so that distances start at 0."""
    prompts = [TOY.extract(c) for c in CLIPS]
    return ReferenceFeatures(prompts=prompts, reference=prompts)


def measure(clips, names, real) -> dict[str, float]:
    part, found = extract(clips, names), {}
    for metric in METRICS:
        if set(metric.names) & set(names):
            found |= {name: score.value for name, score in metric.compute(part, real).items()}
    return found


@pytest.mark.parametrize(("degrade", "strengths", "signs"), DEGRADATIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_scores_get_worse_with_stronger_degradation(degrade, strengths, signs, real):
    steps = [measure(CLIPS, signs, real)]
    steps += [measure([degrade(c, by, i) for i, c in enumerate(CLIPS)], signs, real) for by in strengths]
    for name, sign in signs.items():
        values = [step[name] for step in steps]
        assert all(sign * (after - before) > 0 for before, after in pairwise(values)), (name, values)


def test_known_offset_is_measured_within_one_audio_frame(real):
    for by in (0.04, 0.1, 0.32):
        found = measure([desync(c, by, 0) for c in CLIPS], ["sync_offset_median_s"], real)
        assert abs(found["sync_offset_median_s"] - by) < AUDIO_CODEC.config.hop / RATE


def test_every_metric_has_a_degradation():
    covered = {name for _, _, signs in DEGRADATIONS for name in signs}
    required = {name for metric in METRICS for name in metric.names if not name.endswith(ESTIMATE_SUFFIXES)}
    assert required <= covered | ELSEWHERE, required - covered
    assert {VIDEO, AUDIO} == CLIPS[0].latents.keys()
