"""Thin wrappers around ``torch.distributed``; without a process group they behave as a world of size 1."""

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

GLOO_THREAD_NAME = "pt_gloo_runloop"  # of the threads that run gloo's collectives
MAX_POLLS = 2000  # of these threads at interpreter exit
POLL_INTERVAL_S = 0.005


def get_rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def new_sequence_parallel_group(size: int) -> SequenceGroup | None:
    """Return the group of ``size`` consecutive ranks that share clips with this one; all ranks must call it."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, get_world_size(), size)]
    return SequenceGroup(cast(dist.ProcessGroup, groups[get_rank() // size]))


def is_local_rank_zero() -> bool:
    """Return True for the first process of the run on its machine, by LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def barrier() -> None:
    """Wait for all ranks."""
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its mean over the ranks, in place; return it."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= get_world_size()
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * get_world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_from_rank_zero(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_any(flags: Tensor) -> list[bool]:
    """Return for each flag if it is set on any rank, with one collective for all flags."""
    if get_world_size() > 1:
        flags = flags.float()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def weighted_mean(numbers: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    """Return the weighted mean of each named number over the ranks that have it."""
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for theirs, w in all_gather_object((dict(numbers), weight)):
        for key, value in theirs.items():
            sums[key] += w * value
            weights[key] += w
    return {key: sums[key] / weights[key] for key in sums if weights[key] > 0}


def local_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@atexit.register
def wait_for_gloo_threads() -> None:
    """Wait at interpreter exit until gloo's threads are idle (Linux only).

    A gloo thread releases the tensors of a collective after the ranks have finished it, and needs the interpreter for
    that. During finalization this aborts the process: SIGABRT, "terminate called without an active exception".
    ``destroy_process_group`` ends only threads of unreferenced groups, and DeepSpeed keeps its engines and groups.

    A thread that sleeps and has not been scheduled between two polls is idle.
    """
    previous: dict[str, list[str]] = {}
    for _ in range(MAX_POLLS):
        current = _gloo_thread_states()
        if current == previous and all("State:\tS (sleeping)" in lines for lines in current.values()):
            return
        previous = current
        time.sleep(POLL_INTERVAL_S)


def _gloo_thread_states() -> dict[str, list[str]]:
    """Return the state and context-switch lines of each gloo thread in /proc."""
    found: dict[str, list[str]] = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # the thread has ended
            lines = (task / "status").read_text(errors="replace").splitlines()
            if lines[0] == f"Name:\t{GLOO_THREAD_NAME}":
                found[task.name] = [line for line in lines if line.startswith("State") or "ctxt_switches" in line]
    return found
