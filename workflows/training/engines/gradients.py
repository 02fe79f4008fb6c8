"""Small steps that every engine takes: which weights it trains, their gradients, the learning rate."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteGradientDetector:
    """Looks at every gradient as it is made, before an engine shards or averages it.

    By its sum: one operation per weight where asking every number takes seven. A sum beyond float32 counts as bad too.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        mine = list(parameters)
        self._good = torch.zeros((), device=mine[0].device)
        self._sums: list[Tensor] = []
        for p in mine:
            p.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._sums.append(gradient.sum(dtype=torch.float32))

    @property
    def flag(self) -> Tensor:
        """Whether one was not finite since the last ``clear``."""
        return ~torch.isfinite(torch.stack([self._good, *self._sums])).all()

    def clear(self) -> None:
        self._sums.clear()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that an engine of ``module`` trains, and saves; frozen ones belong to somebody else."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradient_or_zero(p: nn.Parameter) -> Tensor:
    """A weight the losses did not touch has gradient zero (as under ZeRO), so it decays alike in all engines."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
