"""Detection of collapse: static, silent or uniform samples, jumps between chunks, drift, ignored history.

Distillation can collapse to static, silent clips while the losses look normal. An alarm warns and does not stop the
run. Active alarms are in ``alarms.json`` of the run, and at its end in ``outcome.json``.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mfcore.flow import TimeConfig
from mfcore.metrics.av_sync import motion_energy
from mfcore.metrics.continuity import pooled_lag_one_correlation, seam_energy
from mfcore.metrics.history_use import history_losses
from mfcore.metrics.signal_quality import to_decibels
from mfcore.timeline import Timeline
from mfcore.types import MODALITIES, AVBatch, VelocityModel
from workflows.evaluation.signals import DecodedClip
from workflows.utils import distributed
from workflows.utils.json_io import read_intact_json, write_json

_LOGGER = logging.getLogger(__name__)
ALARMS = "alarms.json"
BASELINE_FILE = "history_use.json"
MIN_RATIO = 0.5  # of the data's motion and audio power
MIN_FAKE_RATIO = 0.25  # of the real loss; trained toy runs: 0.5 to 3, a run that generates hum: 0.05 to 0.15
AVERAGED_READINGS = 10  # averaged, since the loss of one batch is noisy
MAX_SEAM_RATIO = 2.0  # of the data's seam energy
MIN_LAG_ONE_RATIO = 0.5  # of the data's correlation between chunks; healthy runs of minutes: 0.73 to 0.97
MIN_DATA_CORRELATION = 0.5  # no alarm for data with less correlation between its chunks
MIN_HISTORY_USE = 0.8  # of the history use at the start of the run (METHOD 9)
MIN_DATA_MOTION = 0.01  # gray levels per frame; no alarm for data with less motion
MIN_DATA_POWER = 1e-6  # of full scale, -60 dB; no alarm for quieter data


@dataclass(frozen=True, kw_only=True)
class CollapseStatistics:
    """Statistics of clips; None for a missing modality."""

    motion: float | None  # mean absolute change of gray levels (0 to 255) per frame
    power: float | None  # mean square of the audio, full scale = 1
    finite: bool
    variance: Mapping[str, float] = field(default_factory=dict[str, float])  # of latents over clips and time
    seam: Mapping[str, float] = field(default_factory=dict[str, float])  # of latents across and inside chunks
    lag1: Mapping[str, float] = field(default_factory=dict[str, float])  # correlation of chunks' mean latents, by lag 1

    @property
    def as_metrics(self) -> dict[str, float]:
        """Motion, and loudness in dB of full scale."""
        out = {} if self.motion is None else {"motion": self.motion}
        return out if self.power is None else out | {"loudness_db": float(to_decibels(np.sqrt(self.power)))}


def collapse_statistics(clips: Sequence[DecodedClip], timeline: Timeline | None = None) -> CollapseStatistics:
    """Return means over the clips; chunk statistics need the ``timeline`` of the latents."""
    motions = [float(motion_energy(c.frames.numpy()).mean()) for c in clips if c.frames is not None]
    powers = [float(c.sound.double().square().mean()) for c in clips if c.sound is not None and len(c.sound)]
    latents = {m: [c.latents[m].numpy() for c in clips] for m in (clips[0].latents if clips else ())}
    seams = {m: _seam(some, m, timeline) for m, some in latents.items()} if timeline else {}
    lags = {m: _lag_one(some, m, timeline) for m, some in latents.items()} if timeline else {}
    return CollapseStatistics(
        motion=float(np.mean(motions)) if motions else None,
        power=float(np.mean(powers)) if powers else None,
        finite=all(c.finite for c in clips),
        variance={m: float(torch.cat([c.latents[m] for c in clips]).double().var(0).mean()) for m in latents},
        seam={m: value for m, value in seams.items() if value is not None},
        lag1={m: value for m, value in lags.items() if value is not None},
    )


def _seam(clips: Sequence[NDArray[np.float32]], modality: str, timeline: Timeline) -> float | None:
    """Return the mean seam energy; None for fewer than two chunks, or chunks of one latent."""
    chunks = len(clips[0]) // timeline.max_count(modality)
    numbers = timeline.chunk_index(modality, chunks).numpy() if chunks > 1 else np.zeros(0, np.int64)
    if len(np.unique(numbers)) < 2 or len(numbers) < 2 * chunks:
        return None
    values = [seam_energy(latents[: len(numbers)], numbers) for latents in clips if len(latents) >= len(numbers)]
    return float(np.mean(values)) if np.isfinite(values).all() else None


def _lag_one(clips: Sequence[NDArray[np.float32]], modality: str, timeline: Timeline) -> float | None:
    """Return the correlation of mean latents of successive chunks, pooled over clips and coordinates.

    None without pairs of chunks or without variance. All coordinates count: which ones are slow is unknown.
    """
    means: list[NDArray[np.float64]] = []
    for latents in clips:
        chunks = len(latents) // timeline.max_count(modality)
        numbers = timeline.chunk_index(modality, chunks).numpy()
        rows = latents[: len(numbers)].reshape(len(numbers), -1).astype(np.float64)
        means.append(np.array([rows[numbers == k].mean(0) for k in range(chunks)]))
    value = pooled_lag_one_correlation(means)
    return value if np.isfinite(value) else None


Alarms = Mapping[str, str]
"""Name of the alarm -> message with the measured value."""


def compare_to_real(
    mode: str, ours: CollapseStatistics, real: CollapseStatistics
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the ratios to log and the alarms of the samples of ``mode``."""
    numbers: dict[str, float] = {}
    alarms: dict[str, str] = {}

    def add(name: str, ratio: float, *, is_healthy: bool, message: str) -> None:
        numbers[f"alarm/{name}"] = ratio
        if not is_healthy:
            alarms[name] = f"{mode}: {message}"

    if not ours.finite:
        alarms[f"finite/{mode}"] = f"{mode}: samples contain non-finite numbers"
    if ours.motion is not None and real.motion is not None and real.motion > MIN_DATA_MOTION:
        ratio = ours.motion / real.motion
        message = f"motion is {ratio:.2f} of the data's"
        add(f"motion/{mode}", ratio, is_healthy=ratio >= MIN_RATIO, message=message)
    if ours.power is not None and real.power is not None and real.power > MIN_DATA_POWER:
        ratio = ours.power / real.power
        message = f"loudness is {ratio:.2f} of the data's (power)"
        add(f"loudness/{mode}", ratio, is_healthy=ratio >= MIN_RATIO, message=message)
    for m in ours.variance.keys() & real.variance.keys():
        if real.variance[m] > 0:
            ratio = ours.variance[m] / real.variance[m]
            message = f"the variance of {m} latents is {ratio:.2f} of the data's"
            add(f"variance/{mode}/{m}", ratio, is_healthy=ratio >= MIN_RATIO, message=message)
    for m in ours.seam.keys() & real.seam.keys():
        if real.seam[m] > 0:
            ratio = ours.seam[m] / real.seam[m]
            message = f"jumps between chunks of {m} have {ratio:.1f} times the data's energy"
            add(f"seam/{mode}/{m}", ratio, is_healthy=ratio <= MAX_SEAM_RATIO, message=message)
    for m in ours.lag1.keys() & real.lag1.keys():
        if real.lag1[m] > MIN_DATA_CORRELATION:
            ratio = ours.lag1[m] / real.lag1[m]
            message = f"the correlation of a chunk of {m} with the next is {ratio:.2f} of the data's"
            add(f"lag1/{mode}/{m}", ratio, is_healthy=ratio >= MIN_LAG_ONE_RATIO, message=message)
    return numbers, alarms


class HistoryUseMonitor:
    """Monitor of the history use of the EMA in multi-step mode, relative to the start of the run.

    A network that ignores its history scores well in drift metrics and in losses on generated history.
    """

    def __init__(self, run_dir: Path, batches: Sequence[AVBatch], time: TimeConfig, seed: int) -> None:
        self._path, self._time, self._seed = run_dir / BASELINE_FILE, time, seed
        self._batches = [b for b in batches if len(b.samples) > 1 and b.chunks > 1]

    def measure(self, model: VelocityModel) -> tuple[dict[str, float], dict[str, str]]:
        """Return metrics over all ranks, and alarms; both empty without clips. Called by all ranks together."""
        sums: dict[str, float] = {}
        for batch in self._batches:
            for m, losses in history_losses(model, batch, self._time, self._seed).items():
                for name, value in losses.items():
                    sums[f"{name}/{m}"] = sums.get(f"{name}/{m}", 0.0) + value
        means = distributed.weighted_mean(sums, len(self._batches))
        use = {m: means[f"other/{m}"] / means[f"own/{m}"] for m in MODALITIES if means.get(f"own/{m}")}
        first = self._load_baseline(use)
        return {f"alarm/history_use/{m}": value for m, value in use.items()}, {
            f"history_use/{m}": f"history use of {m} is {value / first[m]:.2f} of its value at the start of the run"
            for m, value in use.items()
            if value < MIN_HISTORY_USE * first[m]
        }

    def _load_baseline(self, use: dict[str, float]) -> dict[str, float]:
        if distributed.get_rank() != 0:
            return use
        baseline = read_intact_json(self._path)
        if baseline is None:
            write_json(self._path, use, indent=None)
        return baseline or use


class FakeScoreRatio:
    """Ratio of the fake score's loss on samples to the flow-matching loss on real clips."""

    def __init__(self) -> None:
        self._latest: dict[str, deque[float]] = {}

    def measure(self, log: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
        """Return metrics and alarms; both empty without a fake score."""
        numbers = {f"alarm/fake_over_real/{m}": ratio for m, ratio in fake_score_ratio(log).items()}
        for name, ratio in numbers.items():
            self._latest.setdefault(name, deque(maxlen=AVERAGED_READINGS)).append(ratio)
        means = {
            name: float(np.mean(values)) for name, values in self._latest.items() if len(values) == AVERAGED_READINGS
        }
        return numbers, {
            name.removeprefix("alarm/"): f"the fake score's loss on {name.split('/')[-1]} samples is {mean:.2f} of the "
            "loss on real clips"
            for name, mean in means.items()
            if not mean >= MIN_FAKE_RATIO
        }


def fake_score_ratio(log: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio by modality, over the noise-level bins that both losses have."""
    out: dict[str, float] = {}
    for m in {key.split("/")[1] for key in log if key.startswith("fake_score/")}:
        shared = [b for b in range(4) if f"fake_score/{m}/t{b}" in log and f"flow_matching/{m}/t{b}" in log]
        fake, real = (sum(log[f"{term}/{m}/t{b}"] for b in shared) for term in ("fake_score", "flow_matching"))
        if real > 0:
            out[m] = fake / real
    return dict(sorted(out.items()))


class AlarmStore:
    """Active alarms of a run by source; logs changes."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ALARMS
        self._active = read_alarms(run_dir)

    def update(self, source: str, alarms: Alarms, step: int) -> None:
        """Replace the alarms of ``source``."""
        before = self._active.get(source, {})
        self._active[source] = dict(alarms)
        if self._active[source] != before:
            write_json(self._path, {k: v for k, v in self._active.items() if v})
        new = [text for name, text in alarms.items() if name not in before]
        if new:
            _LOGGER.warning(f"ALARM at step {step}: {'; '.join(new)}. The run may be collapsing: check its samples")
        if gone := before.keys() - alarms.keys():
            _LOGGER.info(f"alarm off at step {step}: {', '.join(sorted(gone))}")


def active_alarms(run_dir: Path) -> list[str]:
    """Return the active alarms of a run as messages."""
    return [text for texts in read_alarms(run_dir).values() for text in texts.values()]


def read_alarms(run_dir: Path) -> dict[str, dict[str, str]]:
    """Return the active alarms of a run by source and name."""
    return read_intact_json(run_dir / ALARMS) or {}
