"""CPU stand-in for CUDA graphs: record operators with their tensors, and replay them in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "a recorded pass must not read a value"
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            results = func(*args, **kwargs)
            for output, result in zip(tree_leaves(outputs), tree_leaves(results), strict=True):
                # views and in-place results share memory with the recorded output; copy the others
                if isinstance(output, Tensor) and output.data_ptr() != result.data_ptr():
                    output.copy_(result)


def record_operators(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """Record ``work``, as ``mfcore.model.cuda_graphs.capture_cuda_graph`` does."""
    with _Recorded() as calls:
        outputs = work()
    return outputs, calls.replay


def record_after_warm_up(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """Record ``work`` after two warm-up passes, as on a GPU."""
    with torch.no_grad():
        for _ in range(2):
            work()
    return record_operators(work)
