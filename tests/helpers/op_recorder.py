"""What a CUDA graph does, on a CPU: operators with the very tensors they were recorded with, played again in place."""

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
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "a recording cannot wait for a number"
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def play(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(made), tree_leaves(again), strict=True):
                # views and changes in place are where they were; what is new goes where it was
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def tape(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """A recorder as ``mfcore.model.graphs.cuda_graph``."""
    with _Recorded() as calls:
        made = work()
    return made, calls.play


def warmed_tape(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """With passes before the recording, as there are on a GPU."""
    with torch.no_grad():
        for _ in range(2):
            work()
    return tape(work)
