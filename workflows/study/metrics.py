"""What a generated clip of the study's world is worth, by window of time.

Letters: B clips, K chunks, n latents, c factors. Clips begin with their first chunk; readers are exact rotations.
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

MODE_RADIUS = 0.4  # of a choice of -1 or 1: four spreads
MEAN_SYLLABLE_LEVEL = 0.75  # usual mean of envelope times stress over a syllable
VOICE_CHUNKS = 2  # chunks after which a clip's voice is known


@dataclass(frozen=True, kw_only=True)
class ClipFactors:
    """Clips as factors, and which chunk each latent is of."""

    video: Float[Tensor, "B n 9"]
    audio: Float[Tensor, "B n 7"]
    chunks: int

    @classmethod
    def from_latents(cls, streams: Mapping[str, Stream]) -> "ClipFactors":
        chunk = streams[VIDEO].chunk
        return cls(
            video=latent_world.read_factors(VIDEO, streams[VIDEO].latents.cpu()),
            audio=latent_world.read_factors(AUDIO, streams[AUDIO].latents.cpu()),
            chunks=int(chunk[-1]) + 1,
        )

    def by_chunk(self, modality: str) -> Float[Tensor, "B K m c"]:
        values = self.video if modality == VIDEO else self.audio
        return values.unflatten(1, (self.chunks, -1))


@dataclass(frozen=True, kw_only=True)
class RealStatistics:
    """What real clips are like, for ratios and distances."""

    features: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    motion: float
    loudness: float
    lag1: float
    seam: float


def chunk_choices(factors: ClipFactors) -> tuple[Tensor, Tensor]:
    """Choice per chunk (B, K, 5) and whether every latent of the chunk holds it within reach (B, K, 5)."""
    video, audio = factors.by_chunk(VIDEO), factors.by_chunk(AUDIO)
    picks: list[Tensor] = []
    holds: list[Tensor] = []
    for values in [*(video[..., where] for where in latent_world.TWO_MODES), audio[..., latent_world.TONE]]:
        one = values[..., 0]
        side = torch.where(one[..., :1] > 0, 1.0, -1.0)
        picks.append((side[..., 0] > 0).long())
        holds.append(((one - side).abs() < MODE_RADIUS).all(-1))
    return torch.stack(picks, -1), torch.stack(holds, -1)


def chunk_features(factors: ClipFactors, script: GroundTruth, first: int, last: int) -> np.ndarray:
    """One row per clip and chunk: mean of every factor, and the step of pose across the border before it.

    Identity is what differs from the first frame's, voice what differs from the nearest one that there is: as they
    stand they would be some dozens of independent numbers in a set of clips, and drift would be lost in that.
    """
    video, audio = factors.by_chunk(VIDEO).mean(2), factors.by_chunk(AUDIO).mean(2)
    pose = factors.by_chunk(VIDEO)[..., latent_world.POSE]
    step = torch.zeros_like(pose[:, :, 0])
    step[:, 1:] = (pose[:, 1:, 0] - pose[:, :-1, -1]) * 5
    video[..., latent_world.IDENTITY] -= script.identity[:, None]
    audio[..., latent_world.VOICE] -= script.voices[_nearest(audio[..., latent_world.VOICE], script)]
    rows = torch.cat([video, audio, step], dim=-1)[:, max(first, 1) : last]  # no border before chunk 0
    return rows.flatten(0, 1).double().numpy()


def real_statistics(seed: int, clips: int = 512, chunks: int = 20) -> RealStatistics:
    """Measured on real clips that no network sees."""
    drawn = latent_world.sample_clips(seed, torch.arange(clips) + VALIDATION_SAMPLE_OFFSET, chunks)
    real = ClipFactors.from_latents(drawn.batch.streams)
    rows = chunk_features(real, drawn.script, 0, chunks)
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
    streams: Mapping[str, Stream], script: GroundTruth, window: TimeWindow, ref: RealStatistics
) -> dict[str, float]:
    """Every metric of one window; nan where it does not apply.

    Numbers that are not finite count as the worst.
    """
    made = ClipFactors.from_latents(streams)
    bad = ~(torch.isfinite(made.video).flatten(1).all(1) & torch.isfinite(made.audio).flatten(1).all(1))
    made = ClipFactors(
        video=made.video.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3),
        audio=made.audio.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3),
        chunks=made.chunks,
    )
    length = float(latent_world.CHUNK_SECONDS)
    first, last = int(window.start / length), min(made.chunks, int(window.end / length))
    picks, holds = chunk_choices(made)
    picks, holds = picks[:, first:last], holds[:, first:last]
    rows = (chunk_features(made, script, first, last) - ref.mean) / ref.std
    pose = _pose(made, first, last)
    offset, sync = _sync(made, first, last)
    return {
        "valid": float(holds.all(-1).float().mean()),
        **{f"valid_{name}": float(holds[..., i].float().mean()) for i, name in enumerate(latent_world.CHOICES)},
        "entropy": float(
            np.mean([mode_entropy(picks[..., i].numpy(), 2) for i in range(len(latent_world.CHOICES))]) / np.log(2)
        ),
        "gesture_flips": float((picks[:, 1:, 3] != picks[:, :-1, 3]).float().mean()),
        "syllable_error": _syllable_error(made, script, window),
        "sync": sync,
        "offset_ms": offset,
        "identity_error": _identity_error(made, script, first, last),
        "voice_error": _voice_error(made, script, first, last),
        "voice_entropy": _voice_entropy(made, script, first, last),
        "voice_changes": _voice_changes(made, script, first, last),
        "seam": _seam(pose) / ref.seam,
        "lag1": lag_one_correlation(pose.mean(2).numpy()) / ref.lag1,
        "frechet": frechet_distance(rows, ref.features),
        "motion": _motion(made, first, last) / ref.motion,
        "loudness": float(_of(made.audio, AUDIO, first, last)[..., latent_world.LOUDNESS].clamp_min(0).mean())
        / ref.loudness,
        "failed": float(bad.float().mean()),
    }


def _of(values: Tensor, modality: str, first: int, last: int) -> Tensor:
    per = latent_world.TIMELINE.count(modality, 1)
    return values[:, first * per : last * per]


def _pose(factors: ClipFactors, first: int, last: int) -> Float[Tensor, "B2 K m"]:
    """Both coordinates of pose as separate rows."""
    return factors.by_chunk(VIDEO)[:, first:last, :, latent_world.POSE].permute(0, 3, 1, 2).flatten(0, 1)


def _seam(pose: Float[Tensor, "R K m"]) -> float:
    chunk = np.repeat(np.arange(pose.shape[1]), pose.shape[2])
    return seam_energy(pose.flatten(1).T.numpy(), chunk)


def _motion(factors: ClipFactors, first: int, last: int) -> float:
    """Mean absolute change of pose and mouth inside and across chunks."""
    values = _of(factors.video, VIDEO, first, last)[..., 2:5]
    return float(values.diff(dim=1).abs().mean())


def _identity_error(factors: ClipFactors, script: GroundTruth, first: int, last: int) -> float:
    """Root mean square over clips of what the window's mean identity differs from the first frame's."""
    seen = _of(factors.video, VIDEO, first, last)[..., latent_world.IDENTITY].mean(1)
    return float((seen - script.identity).square().mean().sqrt())


def _voice_error(factors: ClipFactors, script: GroundTruth, first: int, last: int) -> float:
    """The same of what the window's mean voice differs from the nearest one that there is."""
    seen = _of(factors.audio, AUDIO, first, last)[..., latent_world.VOICE].mean(1)
    return float((seen - script.voices[_nearest(seen, script)]).square().mean().sqrt())


def _voice_entropy(factors: ClipFactors, script: GroundTruth, first: int, last: int) -> float:
    """How evenly the voices are chosen over clips: 1 evenly, 0 one for all; nan where there is only one."""
    voices = len(script.voices)
    if voices == 1:
        return float("nan")
    seen = _of(factors.audio, AUDIO, first, last)[..., latent_world.VOICE].mean(1)
    return mode_entropy(_nearest(seen, script).numpy(), voices) / float(np.log(voices))


def _voice_changes(factors: ClipFactors, script: GroundTruth, first: int, last: int) -> float:
    """Share of clips that by the end of the window have another voice, the nearest one, than in their first second."""
    heard = (
        _of(factors.audio, AUDIO, *span)[..., latent_world.VOICE].mean(1)
        for span in ((0, VOICE_CHUNKS), (last - 1, last))
    )
    then, now = (_nearest(voice, script) for voice in heard)
    return float((then != now).float().mean())


def _nearest(voice: Float[Tensor, "*B 2"], script: GroundTruth) -> Int64[Tensor, "*B"]:
    return (voice[..., None, :] - script.voices).square().sum(-1).argmin(-1)


def _syllable_error(factors: ClipFactors, script: GroundTruth, window: TimeWindow) -> float:
    """Share of the syllables that end in the window whose formants are nearest to another one's, or to silence."""
    at = latent_world.latent_midpoints(AUDIO, factors.chunks).float().expand(len(script.end), -1).contiguous()
    now = torch.searchsorted(script.end, at, right=True).clamp_max(script.end.shape[1] - 1)
    batch, said = script.end.shape
    sums = torch.zeros(batch, said, 3).scatter_add_(
        1, now[..., None].expand(-1, -1, 3), factors.audio[..., latent_world.FORMANTS]
    )
    counts = torch.zeros(batch, said).scatter_add_(1, now, torch.ones_like(at))
    heard = torch.cdist(
        sums / counts.clamp_min(1)[..., None], latent_world.FORMANT_SHAPES * MEAN_SYLLABLE_LEVEL
    ).argmin(-1)
    end = min(window.end, factors.chunks * float(latent_world.CHUNK_SECONDS))
    asked = (
        (script.syllable < latent_world.SYLLABLES) & (script.end > window.start) & (script.end <= end) & (counts > 0)
    )
    return float((heard != script.syllable)[asked].float().mean())


def _sync(factors: ClipFactors, first: int, last: int) -> tuple[float, float]:
    """Mean absolute offset of sound against mouth (ms), and mean correlation at offset 0, over clips."""
    video, audio = (latent_world.TIMELINE.times(m, factors.chunks).numpy() for m in (VIDEO, AUDIO))
    per = latent_world.TIMELINE.count(VIDEO, 1)
    mouth = factors.video[..., latent_world.MOUTH].norm(dim=-1).numpy()[:, first * per : last * per]
    when = video[first * per : last * per]
    offsets: list[float] = []
    values: list[float] = []
    half = 1 / 8 - 1 / 16  # the middles of a picture latent and of a sound latent, after their starts
    for opened, loud in zip(mouth, factors.audio[..., 5].numpy(), strict=True):
        heard = np.interp(when + half, audio, loud)
        flat = opened.std() < 1e-6 or heard.std() < 1e-6
        values.append(0.0 if flat else float(np.corrcoef(opened, heard)[0, 1]))
        offsets.append(abs(sync_offset(opened, 4.0, heard, 4.0, 0.5).offset_sec) * 1000)
    return float(np.mean(offsets)), float(np.mean(values))
