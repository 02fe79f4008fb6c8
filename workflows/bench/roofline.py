"""Lower bounds of a step: its FLOPs, the matrix product rate of this machine, and its bytes."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from workflows.utils.timing import synchronize

CPU_MATMUL_SIZE = 1024  # edge of the square matrices
CUDA_MATMUL_SIZE = 8192  # smaller products do not fill a GPU
MATMULS_PER_TIMING = 8


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of matrix products and attention in ``work``, two per multiply-add.

    Attention counts only entries that a dense mask allows. Attention with gradient counts three times, like matrix
    products with their backward pass.
    """
    with (
        FlopCounterMode(display=False, custom_mapping=_ignore_attention_kernels()) as counter,
        _AttentionFlopCounter() as attention,
    ):
        work()
    return counter.get_total_flops() + attention.flops


class _AttentionFlopCounter(TorchFunctionMode):
    """Function mode that counts the FLOPs of unmasked attention entries."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            query, key = args[:2]
            batch, heads, queries, width = query.shape
            mask = kwargs.get("attn_mask")
            useful = batch * queries * key.shape[2]
            if mask is not None:
                visible = mask if mask.dtype == torch.bool else mask.isfinite()
                useful = int(visible.expand(batch, 1, queries, key.shape[2]).sum())
            self.flops += 2 * 2 * heads * width * useful * (3 if out.requires_grad else 1)
        return out


def _ignore_attention_kernels() -> dict[Any, Any]:
    """Return a mapping that disables torch's counts of attention kernels, which ignore masks."""
    aten = torch.ops.aten
    kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    names = [*kernels, *(f"{kernel}_backward" for kernel in kernels)]
    return dict.fromkeys((getattr(aten, f"_scaled_dot_product_{name}") for name in names), lambda *_, **__: 0)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of large square matrix products with the current thread count."""
    edge = CUDA_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    synchronize()
    started = time.perf_counter()
    for _ in range(MATMULS_PER_TIMING):
        torch.mm(a, b)
    synchronize()
    return MATMULS_PER_TIMING * 2 * edge**3 / (time.perf_counter() - started)


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes of all tensors: of the allocator on a GPU, else ``live_tensor_bytes()``."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else live_tensor_bytes()


def live_tensor_bytes() -> int:
    """Return the bytes of all tensors and gradients; shared storage counts once."""
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        # isinstance() triggers warnings of proxies; fake tensors of torch.compile have no storage
        if not issubclass(type(candidate), Tensor) or issubclass(type(candidate), FakeTensor | FunctionalTensor):
            continue
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is not None and tensor.layout == torch.strided and not tensor.is_meta:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address)


@contextmanager
def track_bytes_at_step() -> Iterator[list[int]]:
    """Yield a list that receives ``live_tensor_bytes()`` at every optimizer step."""
    gc.collect()
    bytes_at_step: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: bytes_at_step.append(live_tensor_bytes()))
    try:
        yield bytes_at_step
    finally:
        handle.remove()
