"""Helpers of all engines: trained weights, gradients, learning rate."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteGradientDetector:
    """Detector of non-finite gradients, before an engine shards or averages them.

    It tests the sum of each gradient: one operation per weight, where a test of each number takes seven. A sum beyond
    float32 counts as non-finite too.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        watched = list(parameters)
        self._zero = torch.zeros((), device=watched[0].device)
        self._sums: list[Tensor] = []
        for p in watched:
            p.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self._sums.append(gradient.sum(dtype=torch.float32))

    @property
    def flag(self) -> Tensor:
        """Boolean scalar: a gradient since the last ``clear`` was not finite."""
        return ~torch.isfinite(torch.stack([self._zero, *self._sums])).all()

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that an engine of ``module`` trains and saves; others are frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradient_or_zero(p: nn.Parameter) -> Tensor:
    """Return the gradient; zero for a weight outside all losses, which then decays equally in all engines."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate all elements into one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
