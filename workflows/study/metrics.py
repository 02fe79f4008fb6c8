"""Metrics of generated clips of the synthetic world, per time window.

Letters: B clips, K chunks, n latents, c factors. Clips begin with chunk 0; factors are read by exact rotations.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mfcore.metrics.av_sync import sync_offset
from mfcore.metrics.continuity import lag_one_correlation, seam_energy
from mfcore.metrics.distributions import mode_entropy
from mfcore.metrics.frechet import frechet_distance
from mfcore.metrics.windows import TimeWindow
from mfcore.rng import VALIDATION_SAMPLE_OFFSET
from mfcore.types import AUDIO, VIDEO, Stream
from workflows.study import latent_world
from workflows.study.latent_world import GroundTruth

MODE_RADIUS = 0.4  # around a choice of -1 or 1: four spreads
MEAN_SYLLABLE_LEVEL = 0.75  # mean of envelope times stress over a syllable
VOICE_CHUNKS = 2  # first chunks, which determine a clip's voice


@dataclass(frozen=True, kw_only=True)
class ClipFactors:
    """Factors of a batch of clips."""

    video: Float[Tensor, "B n 9"]
    audio: Float[Tensor, "B n 7"]
    chunks: int

    @classmethod
    def from_latents(cls, streams: Mapping[str, Stream]) -> "ClipFactors":
        """Read the factors of latents."""
        chunk = streams[VIDEO].chunk
        return cls(
            video=latent_world.read_factors(VIDEO, streams[VIDEO].latents.cpu()),
            audio=latent_world.read_factors(AUDIO, streams[AUDIO].latents.cpu()),
            chunks=int(chunk[-1]) + 1,
        )

    def by_chunk(self, modality: str) -> Float[Tensor, "B K m c"]:
        """Return the factors of one modality, grouped by chunk."""
        values = self.video if modality == VIDEO else self.audio
        return values.unflatten(1, (self.chunks, -1))


@dataclass(frozen=True, kw_only=True)
class RealStatistics:
    """Statistics of real clips, the reference of ratios and distances."""

    features: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    motion: float
    loudness: float
    lag1: float
    seam: float


def chunk_choices(factors: ClipFactors) -> tuple[Tensor, Tensor]:
    """Return choices per chunk (B, K, 5), and if all latents are near them (B, K, 5)."""
    video, audio = factors.by_chunk(VIDEO), factors.by_chunk(AUDIO)
    picks: list[Tensor] = []
    valid: list[Tensor] = []
    choices = [video[..., factor] for factor in latent_world.TWO_MODES]
    for choice in [*choices, audio[..., latent_world.TONE]]:
        values = choice[..., 0]
        mode = torch.where(values[..., :1] > 0, 1.0, -1.0)
        picks.append((mode[..., 0] > 0).long())
        valid.append(((values - mode).abs() < MODE_RADIUS).all(-1))
    return torch.stack(picks, -1), torch.stack(valid, -1)


def chunk_features(factors: ClipFactors, truth: GroundTruth, first: int, last: int) -> np.ndarray:
    """Return per clip and chunk the factor means and the step of pose across the border before.

    Identity is relative to the first frame and voice to the nearest voice. The absolute values vary between clips and
    would hide drift.
    """
    video, audio = factors.by_chunk(VIDEO).mean(2), factors.by_chunk(AUDIO).mean(2)
    pose = factors.by_chunk(VIDEO)[..., latent_world.POSE]
    step = torch.zeros_like(pose[:, :, 0])
    step[:, 1:] = (pose[:, 1:, 0] - pose[:, :-1, -1]) * 5
    video[..., latent_world.IDENTITY] -= truth.identity[:, None]
    audio[..., latent_world.VOICE] -= truth.voices[_nearest(audio[..., latent_world.VOICE], truth)]
    rows = torch.cat([video, audio, step], dim=-1)[:, max(first, 1) : last]  # chunk 0 has no border before it
    return rows.flatten(0, 1).double().numpy()


def real_statistics(seed: int, clips: int = 512, chunks: int = 20) -> RealStatistics:
    """Return the statistics of real clips outside of the training set."""
    drawn = latent_world.sample_clips(seed, torch.arange(clips) + VALIDATION_SAMPLE_OFFSET, chunks)
    real = ClipFactors.from_latents(drawn.batch.streams)
    rows = chunk_features(real, drawn.truth, 0, chunks)
    pose = _pose(real, 0, chunks)
    return RealStatistics(
        features=(rows - rows.mean(0)) / rows.std(0),
        mean=rows.mean(0),
        std=rows.std(0),
        motion=_motion(real, 0, chunks),
        loudness=float(real.audio[..., latent_world.LOUDNESS].clamp_min(0).mean()),
        lag1=lag_one_correlation(pose.mean(2).numpy()),
        seam=_seam(pose),
    )


def score_window(
    streams: Mapping[str, Stream], truth: GroundTruth, window: TimeWindow, ref: RealStatistics
) -> dict[str, float]:
    """Return all metrics of one window; nan if undefined. Non-finite latents count as worst."""
    factors = ClipFactors.from_latents(streams)
    non_finite = ~(torch.isfinite(factors.video).flatten(1).all(1) & torch.isfinite(factors.audio).flatten(1).all(1))
    factors = ClipFactors(
        video=factors.video.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3),
        audio=factors.audio.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3),
        chunks=factors.chunks,
    )
    length = float(latent_world.CHUNK_SECONDS)
    first, last = int(window.start / length), min(factors.chunks, int(window.end / length))
    picks, valid = chunk_choices(factors)
    picks, valid = picks[:, first:last], valid[:, first:last]
    rows = (chunk_features(factors, truth, first, last) - ref.mean) / ref.std
    pose = _pose(factors, first, last)
    offset, sync = _sync(factors, first, last)
    return {
        "valid": float(valid.all(-1).float().mean()),
        **{f"valid_{name}": float(valid[..., i].float().mean()) for i, name in enumerate(latent_world.CHOICES)},
        "entropy": float(
            np.mean([mode_entropy(picks[..., i].numpy(), 2) for i in range(len(latent_world.CHOICES))]) / np.log(2)
        ),
        "gesture_flips": float((picks[:, 1:, 3] != picks[:, :-1, 3]).float().mean()),
        "syllable_error": _syllable_error(factors, truth, window),
        "sync": sync,
        "offset_ms": offset,
        "identity_error": _identity_error(factors, truth, first, last),
        "voice_error": _voice_error(factors, truth, first, last),
        "voice_entropy": _voice_entropy(factors, truth, first, last),
        "voice_changes": _voice_changes(factors, truth, first, last),
        "seam": _seam(pose) / ref.seam,
        "lag1": lag_one_correlation(pose.mean(2).numpy()) / ref.lag1,
        "frechet": frechet_distance(rows, ref.features),
        "motion": _motion(factors, first, last) / ref.motion,
        "loudness": float(
            _latents_of_chunks(factors.audio, AUDIO, first, last)[..., latent_world.LOUDNESS].clamp_min(0).mean()
        )
        / ref.loudness,
        "failed": float(non_finite.float().mean()),
    }


def _latents_of_chunks(values: Tensor, modality: str, first: int, last: int) -> Tensor:
    per = latent_world.TIMELINE.count(modality, 1)
    return values[:, first * per : last * per]


def _pose(factors: ClipFactors, first: int, last: int) -> Float[Tensor, "B2 K m"]:
    """Return pose per chunk, one row per clip and coordinate."""
    return factors.by_chunk(VIDEO)[:, first:last, :, latent_world.POSE].permute(0, 3, 1, 2).flatten(0, 1)


def _seam(pose: Float[Tensor, "R K m"]) -> float:
    chunk = np.repeat(np.arange(pose.shape[1]), pose.shape[2])
    return seam_energy(pose.flatten(1).T.numpy(), chunk)


def _motion(factors: ClipFactors, first: int, last: int) -> float:
    """Return the mean absolute change of pose and mouth between latents."""
    values = _latents_of_chunks(factors.video, VIDEO, first, last)[..., 2:5]
    return float(values.diff(dim=1).abs().mean())


def _identity_error(factors: ClipFactors, truth: GroundTruth, first: int, last: int) -> float:
    """Return the RMS over clips of the mean identity minus that of the first frame."""
    seen = _latents_of_chunks(factors.video, VIDEO, first, last)[..., latent_world.IDENTITY].mean(1)
    return float((seen - truth.identity).square().mean().sqrt())


def _voice_error(factors: ClipFactors, truth: GroundTruth, first: int, last: int) -> float:
    """Return the RMS over clips of the mean voice minus the nearest voice."""
    seen = _latents_of_chunks(factors.audio, AUDIO, first, last)[..., latent_world.VOICE].mean(1)
    return float((seen - truth.voices[_nearest(seen, truth)]).square().mean().sqrt())


def _voice_entropy(factors: ClipFactors, truth: GroundTruth, first: int, last: int) -> float:
    """Return the normalized entropy of voices over clips: 1 uniform; nan with one voice."""
    voices = len(truth.voices)
    if voices == 1:
        return float("nan")
    seen = _latents_of_chunks(factors.audio, AUDIO, first, last)[..., latent_world.VOICE].mean(1)
    return mode_entropy(_nearest(seen, truth).numpy(), voices) / float(np.log(voices))


def _voice_changes(factors: ClipFactors, truth: GroundTruth, first: int, last: int) -> float:
    """Return the share of clips with another voice at the window's end than at the start."""
    start = _latents_of_chunks(factors.audio, AUDIO, 0, VOICE_CHUNKS)[..., latent_world.VOICE].mean(1)
    end = _latents_of_chunks(factors.audio, AUDIO, last - 1, last)[..., latent_world.VOICE].mean(1)
    return float((_nearest(start, truth) != _nearest(end, truth)).float().mean())


def _nearest(voice: Float[Tensor, "*B 2"], truth: GroundTruth) -> Int64[Tensor, "*B"]:
    return (voice[..., None, :] - truth.voices).square().sum(-1).argmin(-1)


def _syllable_error(factors: ClipFactors, truth: GroundTruth, window: TimeWindow) -> float:
    """Return the share of syllables ending in the window with wrong nearest formants."""
    at = latent_world.latent_midpoints(AUDIO, factors.chunks).float().expand(len(truth.end), -1).contiguous()
    now = torch.searchsorted(truth.end, at, right=True).clamp_max(truth.end.shape[1] - 1)
    batch, syllables = truth.end.shape
    sums = torch.zeros(batch, syllables, 3).scatter_add_(
        1, now[..., None].expand(-1, -1, 3), factors.audio[..., latent_world.FORMANTS]
    )
    counts = torch.zeros(batch, syllables).scatter_add_(1, now, torch.ones_like(at))
    nearest = torch.cdist(
        sums / counts.clamp_min(1)[..., None], latent_world.FORMANT_SHAPES * MEAN_SYLLABLE_LEVEL
    ).argmin(-1)
    end = min(window.end, factors.chunks * float(latent_world.CHUNK_SECONDS))
    counted = (truth.syllable < latent_world.SYLLABLES) & (truth.end > window.start) & (truth.end <= end) & (counts > 0)
    return float((nearest != truth.syllable)[counted].float().mean())


def _sync(factors: ClipFactors, first: int, last: int) -> tuple[float, float]:
    """Return the mean absolute A/V offset (ms) and the mean correlation at offset 0, over clips."""
    video, audio = (latent_world.TIMELINE.times(m, factors.chunks).numpy() for m in (VIDEO, AUDIO))
    per = latent_world.TIMELINE.count(VIDEO, 1)
    mouth = factors.video[..., latent_world.MOUTH].norm(dim=-1).numpy()[:, first * per : last * per]
    when = video[first * per : last * per]
    offsets: list[float] = []
    values: list[float] = []
    half = 1 / 8 - 1 / 16  # seconds: half a video latent minus half an audio latent
    for opening, loudness in zip(mouth, factors.audio[..., 5].numpy(), strict=True):
        loudness = np.interp(when + half, audio, loudness)
        flat = opening.std() < 1e-6 or loudness.std() < 1e-6
        values.append(0.0 if flat else float(np.corrcoef(opening, loudness)[0, 1]))
        offsets.append(abs(sync_offset(opening, 4.0, loudness, 4.0, max_lag=0.5).offset_sec) * 1000)
    return float(np.mean(offsets)), float(np.mean(values))
