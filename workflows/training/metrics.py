"""Throughput and memory of a run, and its progress line.

Metrics of a run, logged every ``log_every`` steps (+), ``eval_every`` steps (*) or ``sample_every`` samples (#):

=============================================  ====================================================================
samples_seen                                   x axis of everything that is compared between runs
TERM/MODALITY                               +  loss, e.g. flow_matching/video: unweighted mean of the global batch
TERM/MODALITY/t0 .. t3                      +  the same by noise level, in quarters from clean (t0) to noise (t3)
TERM/MODALITY/chunk_first, _middle, _last   +  the same by position of the chunk in its clip: does history help?
held_out/TERM/MODALITY                      *  on the first held-out clips, always with the same noise
grad_norm/NETWORK, lr/NETWORK               +  before clipping; of student and, in the mutual stage, fake
speed/samples_per_s, speed/tokens_per_s     +  of training over all ranks, since the last entry
speed/left_s                                +  at the run's mean speed, evaluations and samples included
speed/data_wait_s, speed/data_wait_share    +  waiting for batches per step, and its share of time; of the slowest rank
speed/checkpoint_s                          +  seconds blocked by saving since the last entry
memory/rss_gib                              +  of the largest rank's process
memory/gpu_allocated_gib, gpu_reserved_gib,
memory/gpu_peak_gib                         +  of the fullest GPU
gpu/utilisation_percent                     +  of the least busy GPU; where NVIDIA's library for it is installed
alarm/fake_over_real/MODALITY               +  the fake score's loss over flow matching's, at equal noise levels
sample/METRIC/MODE                          #  every metric of `mfctl evaluate` that can be measured, of a few samples;
                                               MODE is few, multi, or real: the reference clips
sample/METRIC/MODE/WINDOW                   #  what may drift, by window of time, e.g. sample/identity_error/few/5-15
sample/failed                               #  1 where samples could not be generated; log.txt has the reason
sample/seconds                              #  time of generation and scores
alarm/motion/MODE, alarm/loudness/MODE      #  over the real clips' (loudness as power)
alarm/variance/MODE/MODALITY                #  of latents over clips and time, over the real clips'
alarm/seam/MODE/MODALITY                    #  energy of jumps between chunks of latents, over the real clips'
alarm/lag1/MODE/MODALITY                    #  correlation of chunks' mean latents with the next's, over the real clips'
alarm/history_use/MODALITY                  *  loss on another clip's history over loss on the true one (mutual stage)
alarm/raised                                #  number of active alarms
=============================================  ====================================================================
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from workflows.training.progress import Progress
from workflows.utils import distributed
from workflows.utils.progress import ProgressEvent

GIB = float(1 << 30)
NON_LOSS_PREFIXES = ("grad_norm/", "lr/", "speed/", "memory/", "gpu/", "alarm/", "sample/")


@dataclass(frozen=True, kw_only=True)
class _RankTotals:
    """Totals of one rank since the last log entry."""

    samples: float
    tokens: float
    waited: float  # seconds
    memory: dict[str, float]  # metrics of memory and GPU


class ThroughputMeter:
    """Meter of samples, tokens and waiting times since the last log entry."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._begun = self._paused = time.perf_counter()
        self._total_samples = 0.0
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._samples = self._tokens = 0.0
        self._steps = 0
        self._waited = self._saved = self._excluded = 0.0

    def batch_ready(self) -> None:
        """Count the time since ``step_end`` as waiting for the batch."""
        self._waited += time.perf_counter() - self._paused

    def step_end(self) -> None:
        """Start to wait for the next batch."""
        self._paused = time.perf_counter()

    def count(self, samples: float, tokens: float) -> None:
        """Add the samples and tokens of this rank in one step."""
        self._samples += samples
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the enclosed time as blocked by a checkpoint."""
        start = time.perf_counter()
        yield
        self._saved += time.perf_counter() - start

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Exclude the enclosed time from the throughput (evaluation, samples)."""
        start = time.perf_counter()
        yield
        self._excluded += time.perf_counter() - start

    def collect(self, left: int) -> dict[str, float]:
        """Return metrics over all ranks and reset. Called by all ranks; ``left``: samples until the end of the run."""
        now = time.perf_counter()
        elapsed = max(1e-9, now - self._since - self._excluded)
        totals = _RankTotals(samples=self._samples, tokens=self._tokens, waited=self._waited, memory=self._memory())
        ranks: list[_RankTotals] = distributed.all_gather_object(totals)
        samples = sum(rank.samples for rank in ranks)
        tokens = sum(rank.tokens for rank in ranks)
        waited = max(rank.waited for rank in ranks)
        self._total_samples += samples
        out = {
            "speed/samples_per_s": samples / elapsed,
            "speed/tokens_per_s": tokens / elapsed,
            "speed/data_wait_s": waited / max(1, self._steps),
            "speed/data_wait_share": waited / elapsed,
        }
        out |= {"speed/left_s": left * (now - self._begun) / self._total_samples} if self._total_samples else {}
        out |= {"speed/checkpoint_s": self._saved} if self._saved else {}
        for name in ranks[0].memory:
            values = [rank.memory[name] for rank in ranks if name in rank.memory]
            out[name] = min(values) if name.startswith("gpu/") else max(values)
        self._reset()
        return out

    def _memory(self) -> dict[str, float]:
        out = {"memory/rss_gib": self._process.memory_info().rss / GIB}
        if torch.cuda.is_available():
            out["memory/gpu_allocated_gib"] = torch.cuda.memory_allocated() / GIB
            out["memory/gpu_reserved_gib"] = torch.cuda.memory_reserved() / GIB
            out["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            busy = gpu_utilization()
            out |= {} if busy is None else {"gpu/utilisation_percent": busy}
        return out


def gpu_utilization() -> float | None:
    """Return the utilization of this rank's GPU in percent, or None without NVIDIA's library."""
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):  # NVIDIA's Python or driver library is missing
        return None


def progress_event(stage: str, steps: int, progress: Progress, log: Mapping[str, float]) -> ProgressEvent:
    """Return the event of a step: losses, speed and time left as text."""
    losses = {
        k: v
        for k, v in log.items()
        if k.removeprefix("held_out/").count("/") == 1 and not k.startswith(NON_LOSS_PREFIXES)
    }
    losses = losses if log else {f"held_out/{k}": v for k, v in progress.first.items()}
    parts = [f"{k} {v:.4f}" for k, v in losses.items()]
    if "speed/samples_per_s" in log:
        parts += [f"{log['speed/samples_per_s']:.1f} samples/s", f"{format_count(log['speed/tokens_per_s'])} tokens/s"]
    if "speed/left_s" in log:
        parts.append(f"{format_duration(log['speed/left_s'])} left")
    return ProgressEvent(stage=stage, step=progress.step, steps=steps, text="  ".join(parts))


def format_count(number: float) -> str:
    """Return a number with three digits: 950, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Return a duration, rounded up: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
