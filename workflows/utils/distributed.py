"""The processes of one run: what the training loop asks of them, and nothing else.

Thin words over ``torch.distributed``; without a process group they describe a single process.
"""

import atexit
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mfcore.model.sequence_parallel import SequenceGroup

GLOO_THREAD_NAME = "pt_gloo_runloop"  # what gloo's threads that carry out exchanges are called
LOOKS, PAUSE = 2000, 0.005  # at them when Python ends: so often at most, so many seconds apart


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def new_sequence_parallel_group(size: int) -> SequenceGroup | None:
    """The consecutive ranks, so many, that share the tokens of the same clips with this one. Called by all ranks."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, get_world_size(), size)]
    return SequenceGroup(cast(dist.ProcessGroup, groups[get_rank() // size]))


def is_local_rank_zero() -> bool:
    """Whether this is the first process of the run on its machine (the launcher says so in LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def barrier() -> None:
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """In place: the mean of ``tensor`` over the ranks."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's ``value``, in the order of the ranks, on every rank."""
    if get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * get_world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_from_rank_zero(value: Any) -> Any:
    """Rank 0's ``value`` on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_any(flags: Tensor) -> list[bool]:
    """For each flag whether it is set on any rank: one message for all."""
    if get_world_size() > 1:
        flags = flags.float()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def weighted_mean(numbers: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    """Weighted mean over the ranks of each named number, over those ranks that have it."""
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for theirs, w in all_gather_object((dict(numbers), weight)):
        for key, value in theirs.items():
            sums[key] += w * value
            weights[key] += w
    return {key: sums[key] / weights[key] for key in sums if weights[key] > 0}


def local_device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@atexit.register
def wait_for_gloo_threads() -> None:
    """Wait, when Python ends, until gloo's threads have nothing left to do (on Linux, which tells).

    Such a thread lets go of the tensors of an exchange when the ranks have gone on from it, for which it needs Python.
    If Python is ending, that ends the thread inside C++, and so the process: SIGABRT, "terminate called without an
    active exception". ``destroy_process_group`` ends only threads of groups that nothing refers to, and DeepSpeed keeps
    its engines and groups.

    A thread that sleeps, and has not woken while this one did so too, waits for work: not for Python, not for a core.
    """
    before: dict[str, list[str]] = {}
    for _ in range(LOOKS):
        now = _exchangers()
        if now == before and all("State:\tS (sleeping)" in facts for facts in now.values()):
            return
        before = now
        time.sleep(PAUSE)


def _exchangers() -> dict[str, list[str]]:
    """What Linux says of each of gloo's threads: its state, and how often it has slept or been put aside."""
    found: dict[str, list[str]] = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # just ended
            lines = (task / "status").read_text(errors="replace").splitlines()
            if lines[0] == f"Name:\t{GLOO_THREAD_NAME}":
                found[task.name] = [line for line in lines if line.startswith("State") or "ctxt_switches" in line]
    return found
