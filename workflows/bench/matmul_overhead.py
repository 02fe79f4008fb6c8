"""Time of a forward pass over the time of its matrix products and attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
MIN_ROUNDS = 15  # the minimum of a few rounds is that of a busy machine


@dataclass(frozen=True, kw_only=True)
class MatmulOverhead:
    """Minimum time over the minimum time of the matrix products and attention alone."""

    forward: float  # the velocities of a batch
    block: float  # one block of each branch, and the attention between them


class _MatmulRecorder(TorchDispatchMode):
    """Dispatch mode that records calls of matrix products and attention with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in MATMUL_OPS or name.startswith(ATTENTION_OP):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


@contextmanager
def record_layer_inputs(model: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a list that receives the arguments of every ``model.run_layer`` call."""
    inputs: list[tuple[Any, ...]] = []
    run_layer = model.run_layer

    def record_and_run(*args: Any) -> Any:
        inputs.append(args)
        return run_layer(*args)

    model.run_layer = record_and_run  # hides the method of the class
    try:
        yield inputs
    finally:
        del model.run_layer


@torch.no_grad()
def measure_matmul_overhead(config: RunConfig, batch: AVBatch, rounds: int) -> MatmulOverhead:
    """Return the overhead for a training batch with a filled KV cache (interleaved rounds)."""
    device = batch.cond.caption.device
    model: Any = build_initial_network(config, {}).to(device).eval()
    t = constant_levels(batch.streams, dict.fromkeys(batch.streams, 0.5))
    with torch.autocast(device.type, config.engine.autocast, enabled=config.engine.autocast is not None):
        context = DenoiserContext(model=model, cond=batch.cond).append_history(history_of(batch.streams), None)

        def forward() -> object:
            return context.velocity(batch.streams, t, t)

        with record_layer_inputs(model) as inputs:
            forward()
        last_layer = inputs[-1]
        return MatmulOverhead(
            forward=_time_over_matmuls(forward, device, max(rounds, MIN_ROUNDS)),
            block=_time_over_matmuls(lambda: model.run_layer(*last_layer), device, max(rounds, MIN_ROUNDS)),
        )


def _time_over_matmuls(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    with _MatmulRecorder() as matmuls:
        work()
    work_s: list[float] = []
    matmul_s: list[float] = []
    for _ in range(rounds + 1):
        work_s.append(timing.time_call(device, work)[0])
        matmul_s.append(timing.time_call(device, matmuls.replay)[0])
    return min(work_s[1:]) / min(matmul_s[1:])  # the first round warms up
