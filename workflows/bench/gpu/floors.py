"""Counted lower bounds: operations over the product rate, bytes over the bandwidth, launches times their interval."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfcore.model.config import ModelConfig
from mfcore.model.flops import ChunkWorkload, chunk_flops
from mfcore.model.transformer import AVTransformer
from workflows.bench import roofline
from workflows.inference.precision import keep_in_fp32
from workflows.utils.timing import time_call

COPY_BYTES = {"cuda": 2 << 30, "cpu": 16 << 20}
NO_KERNEL = (
    "_unsafe_view",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one machine."""

    flops_per_s: float  # of large products
    bytes_per_s: float  # of a copy, read and written bytes counted
    launch_s: float = 5e-6  # between kernels that are launched from Python


H200 = Rates(flops_per_s=780e12, bytes_per_s=4.3e12)
"""Rates in bfloat16 that the predictions in docs/performance.md are computed with."""


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Return the rates of this device."""
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(time_call(device, target.copy_, source)[0] for _ in range(5))
    return Rates(flops_per_s=roofline.matmul_flops_per_s(device, dtype), bytes_per_s=2 * source.nbytes / seconds)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counted work of a chunk or of a step."""

    flops: float
    bytes: float
    launches: int

    def floor(self, rates: Rates) -> dict[str, float]:
        """Return the seconds of each bound. ``floor_s`` is that of products and bytes; launches vanish in a graph."""
        products, moved = self.flops / rates.flops_per_s, self.bytes / rates.bytes_per_s
        return {
            "products_s": products,
            "bytes_s": moved,
            "launches_s": self.launches * rates.launch_s,
            "floor_s": max(products, moved),
        }


def chunk_work(model: ModelConfig, load: ChunkWorkload, *, steps: int, element: int, rows: int, launches: int) -> Work:
    """Return the work of one chunk of ``rows`` streams in one pass: ``steps`` evaluations and the cache pass.

    Weights are read once per pass, those of the transcript once per chunk, those of the caption never: its keys and
    values are cached. ``element``: bytes of weights and cache.
    """
    every_pass, once = _weight_bytes(model, element)
    width = model.key_heads * model.head_dim
    cache = 2 * model.layers * load.seen * width * element * rows
    caption = 2 * model.layers * len(load.tokens) * (load.caption + 1) * model.dim * element * rows
    return Work(
        flops=rows * chunk_flops(model, load, steps),
        bytes=(steps + 1) * (every_pass + cache + caption) + once,
        launches=launches,
    )


def _weight_bytes(model: ModelConfig, element: int) -> tuple[int, int]:
    """Return the bytes of the weights that every pass reads, and of those that a chunk reads once."""
    with torch.device("meta"):
        net = AVTransformer(model)
    every_pass = once = 0
    for name, weight in net.named_parameters():
        size = weight.numel() * (4 if keep_in_fp32(name) else element)
        if ".text.words." in name:
            once += size
        elif ".text.caption." not in name:
            every_pass += size
    return every_pass, once


class _LaunchCounter(TorchDispatchMode):
    """Mode that counts operators that run a kernel: not views, allocations and work on CPU tensors of a GPU pass."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.count = 0
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            here = (x for x in tree_leaves((out, args)) if isinstance(x, Tensor))
            self.count += any(x.device.type == self._device for x in here)
        return out


def count_launches(device: torch.device, work: Callable[[], object]) -> int:
    """Return the kernels that an eager pass launches on the device, one per operator."""
    with _LaunchCounter(device.type) as counter:
        work()
    return counter.count
