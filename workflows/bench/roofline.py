"""What a step must cost whatever runs it: the operations it counts, the rate this machine multiplies at, its bytes."""

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

CPU_MATMUL_SIZE = 1024  # of the square matrices whose product gives the rate
CUDA_MATMUL_SIZE = 8192  # of those on a GPU, which smaller ones leave idle
MATMULS_PER_TIMING = 8  # in a reading


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products that ``work`` does, and of the attention that it needs: two per multiply-add.

    Of a dense mask only the entries that it allows are counted, whatever a kernel multiplies besides; an attention
    that will be differentiated counts three times, as products do.
    """
    with (
        FlopCounterMode(display=False, custom_mapping=_ignore_attention_kernels()) as counter,
        _AttentionFlopCounter() as attention,
    ):
        work()
    return counter.get_total_flops() + attention.flops


class _AttentionFlopCounter(TorchFunctionMode):
    """Counts useful entries of all attention inside."""

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
    """torch counts some kernels, and without a look at the mask."""
    aten = torch.ops.aten
    kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    names = [*kernels, *(f"{kernel}_backward" for kernel in kernels)]
    return dict.fromkeys((getattr(aten, f"_scaled_dot_product_{name}") for name in names), lambda *_, **__: 0)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large square products in this process, with the threads it has."""
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
    """Bytes of all tensors: of a GPU as its allocator counts them, else ``live_bytes``."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else live_tensor_bytes()


def live_tensor_bytes() -> int:
    """Bytes of all tensors of this process that Python knows, and of their gradients; shared storage counts once."""
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        # isinstance() asks proxies for their class, and some warn; torch.compile keeps tensors that are shapes alone
        if not issubclass(type(candidate), Tensor) or issubclass(type(candidate), FakeTensor | FunctionalTensor):
            continue
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is not None and tensor.layout == torch.strided and not tensor.is_meta:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address)


@contextmanager
def track_bytes_at_step() -> Iterator[list[int]]:
    """``live_bytes`` at every optimizer step inside: weights, masters, moments and gradients, and no activations."""
    gc.collect()
    bytes_at_step: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda *_: bytes_at_step.append(live_tensor_bytes()))
    try:
        yield bytes_at_step
    finally:
        handle.remove()
