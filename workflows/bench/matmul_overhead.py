"""How much of a forward pass is not matrix products: norms, rotations, modulation, copies, Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfcore.solver import DenoiserContext, constant_levels, history_of
from mfcore.types import AVBatch
from workflows.config.run import RunConfig
from workflows.training.networks import build_initial_network
from workflows.utils import timing

MATMUL_OPS = ("addmm", "mm", "bmm", "baddbmm")
ATTENTION_OP = "_scaled_dot_product"
LEAST_ROUNDS = 15  # the least time of a few rounds is that of a busy machine


@dataclass(frozen=True, kw_only=True)
class MatmulOverhead:
    """Least time of some work over the least time of its matrix products and attention alone."""

    forward: float  # the velocities of a batch
    block: float  # one block of each branch, and the attention between them


class _Recorded(TorchDispatchMode):
    """Keeps the calls of matrix products and attention inside, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in MATMUL_OPS or name.startswith(ATTENTION_OP):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


@torch.no_grad()
def measure_matmul_overhead(config: RunConfig, batch: AVBatch, rounds: int) -> MatmulOverhead:
    """Of a training batch whose history is remembered before; work and products take turns."""
    device = batch.cond.caption.device
    model: Any = build_initial_network(config, {}).to(device).eval()
    t = constant_levels(batch.streams, dict.fromkeys(batch.streams, 0.5))
    with torch.autocast(device.type, config.engine.autocast, enabled=config.engine.autocast is not None):
        context = DenoiserContext(model=model, cond=batch.cond).append_history(history_of(batch.streams), None)
        forward = lambda: context.velocity(batch.streams, t, t)
        given, run = list[tuple[Any, ...]](), model.run_layer
        model.run_layer = lambda *args: given.append(args) or run(*args)  # hides the method
        forward()
        del model.run_layer
        block = lambda: run(*given[-1])
        return MatmulOverhead(
            forward=_over_products(forward, device, max(rounds, LEAST_ROUNDS)),
            block=_over_products(block, device, max(rounds, LEAST_ROUNDS)),
        )


def _over_products(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    with _Recorded() as products:
        work()
    times = [
        (timing.time_call(device, work)[0], timing.time_call(device, products.again)[0]) for _ in range(rounds + 1)
    ]
    whole, alone = (min(column) for column in zip(*times[1:], strict=True))
    return whole / alone
