"""How much of a forward pass is not matrix products: norms, rotations, modulation, copies, Python."""

from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfcore.steps import Context, levels, past
from mfcore.types import AVBatch
from workflows.bench import limits
from workflows.config import RunConfig
from workflows.stages import initial_network

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product"


class _Recorded(TorchDispatchMode):
    """Keeps the calls of matrix products and attention inside, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


@torch.no_grad()
def forward_over_products(config: RunConfig, batch: AVBatch, rounds: int) -> float:
    """Time of the velocities of a training batch over the time of the same matrix products alone, in turns; the
    median. History is remembered before."""
    device = batch.cond.caption.device
    model = initial_network(config, {}).to(device).eval()
    t = levels(batch.streams, dict.fromkeys(batch.streams, 0.5))
    with torch.autocast(device.type, config.engine.autocast, enabled=config.engine.autocast is not None):
        context = Context(model=model, cond=batch.cond).remember(past(batch.streams), None)
        with _Recorded() as products:
            context.velocity(batch.streams, t, t)
        ratios: list[float] = []
        for _ in range(rounds + 1):
            whole, _ = limits.timed(device, context.velocity, batch.streams, t, t)
            alone, _ = limits.timed(device, products.again)
            ratios.append(whole / alone)
    return median(ratios[1:])
