"""How fast a run goes and what it holds, and the line that people see.

What a run logs, at every ``log_every`` steps (+), every ``eval_every`` steps (*), every ``sample_every`` samples (#):

=============================================  ====================================================================
samples_seen                                   x axis of everything that is compared between runs
TERM/MODALITY                               +  loss, e.g. flow_matching/video: unweighted mean of the global batch
TERM/MODALITY/t0 .. t3                      +  the same by noise level, in quarters from clean (t0) to noise (t3)
TERM/MODALITY/chunk_first, _middle, _last   +  the same by the place of the chunk in its clip: does history help?
held_out/TERM/MODALITY                      *  on the first held-out clips, always with the same noise
grad_norm/NETWORK, lr/NETWORK               +  before clipping; of student and, in the mutual stage, fake
speed/samples_per_s, speed/tokens_per_s     +  of training over all ranks, since the last entry
speed/left_s                                +  at the run's mean speed, evaluations and samples included
speed/data_wait_s, speed/data_wait_share    +  waiting for batches per step, and its share of time; of the slowest rank
speed/checkpoint_s                          +  training stood still for saving, since the last entry
memory/rss_gib                              +  of the largest rank's process
memory/gpu_allocated_gib, gpu_reserved_gib,
memory/gpu_peak_gib                         +  of the fullest GPU
gpu/utilisation_percent                     +  of the least busy GPU; where NVIDIA's library for it is installed
alarm/fake_over_real/MODALITY               +  the fake score's loss over flow matching's, at equal noise levels
sample/METRIC/MODE                          #  every metric of `mfctl evaluate` that can be measured, of a few samples;
                                               MODE is few, multi, or real: the clips they are judged by
sample/METRIC/MODE/WINDOW                   #  what may drift, by window of time, e.g. sample/identity_error/few/5-15
sample/failed                               #  1 where samples could not be made; log.txt says why
sample/seconds                              #  that making them took
alarm/motion/MODE, alarm/loudness/MODE      #  over the real clips' (loudness as power)
alarm/variance/MODE/MODALITY                #  of latents over clips and time, over the real clips'
alarm/seam/MODE/MODALITY                    #  energy of jumps between chunks of latents, over the real clips'
alarm/lag1/MODE/MODALITY                    #  correlation of chunks' mean latents with the next's, over the real clips'
alarm/history_use/MODALITY                  *  loss on another clip's history over loss on the own (mutual stage)
alarm/raised                                #  how many of the alarms are on
=============================================  ====================================================================
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from workflows.training.progress import Progress
from workflows.utils import distributed
from workflows.utils.progress import ProgressEvent

GIB = float(1 << 30)
NON_LOSS_PREFIXES = ("grad_norm/", "lr/", "speed/", "memory/", "gpu/", "alarm/", "sample/")


class ThroughputMeter:
    """What this rank has done since it was last read, and what all of them together make of it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._begun = self._paused = time.perf_counter()
        self._all = 0.0
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        self._samples = self._tokens = 0.0
        self._steps = 0
        self._waited = self._saved = self._apart = 0.0

    def batch_ready(self) -> None:
        """The batch is here for which this rank has waited since ``pause``."""
        self._waited += time.perf_counter() - self._paused

    def step_end(self) -> None:
        """A step has ended."""
        self._paused = time.perf_counter()

    def count(self, samples: float, tokens: float) -> None:
        """What this rank has computed in one step."""
        self._samples += samples
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Training stands still for a checkpoint."""
        began = time.perf_counter()
        yield
        self._saved += time.perf_counter() - began

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """What is no training: evaluation, samples."""
        began = time.perf_counter()
        yield
        self._apart += time.perf_counter() - began

    def collect(self, left: int) -> dict[str, float]:
        """Over all ranks, which call it together. ``left``: samples until the run ends."""
        now = time.perf_counter()
        elapsed = max(1e-9, now - self._since - self._apart)
        everyone = distributed.all_gather_object((self._samples, self._tokens, self._waited, self._holdings()))
        samples, tokens = (sum(part[i] for part in everyone) for i in (0, 1))
        waited = max(part[2] for part in everyone)
        self._all += samples
        out = {
            "speed/samples_per_s": samples / elapsed,
            "speed/tokens_per_s": tokens / elapsed,
            "speed/data_wait_s": waited / max(1, self._steps),
            "speed/data_wait_share": waited / elapsed,
        }
        out |= {"speed/left_s": left * (now - self._begun) / self._all} if self._all else {}
        out |= {"speed/checkpoint_s": self._saved} if self._saved else {}
        for name in everyone[0][3]:
            values = [part[3][name] for part in everyone if name in part[3]]
            out[name] = min(values) if name.startswith("gpu/") else max(values)
        self._start()
        return out

    def _holdings(self) -> dict[str, float]:
        out = {"memory/rss_gib": self._process.memory_info().rss / GIB}
        if torch.cuda.is_available():
            out["memory/gpu_allocated_gib"] = torch.cuda.memory_allocated() / GIB
            out["memory/gpu_reserved_gib"] = torch.cuda.memory_reserved() / GIB
            out["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            busy = gpu_utilisation()
            out |= {} if busy is None else {"gpu/utilisation_percent": busy}
        return out


def gpu_utilisation() -> float | None:
    """Percent of the last moment in which this rank's GPU computed. None where it cannot be asked."""
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):  # NVIDIA's Python library, or the driver's, is not there
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
    """Three digits: 950, 12.3k, 4.56M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Rounded up: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
