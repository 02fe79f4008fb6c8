"""Fake score as low-rank terms (LoRA) on the EMA network (METHOD 6): one set of base weights, two networks.

The teacher is the EMA, and the fake score is the EMA plus trainable low-rank terms. This saves a second copy of
weights, gradients and moments. Both networks share the *same* frozen parameters, so an EMA update also moves the fake
score. The terms have no switch, so either network can run at any time, also in a backward pass (recomputed layers).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfcore.errors import UserInputError, check_range
from mfcore.rng import generator


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig:
    """Fake score of the mutual stage."""

    rank: int | None = None  # rank of its terms on the EMA; None: a full copy of the student
    gain: float = 8.0  # factor of the terms; width / (2 rank) learns about as fast as a full copy

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserInputError(
                f"fake.rank must be at least 1, or null for a full copy of the network; got {self.rank}"
            )
        check_range("fake.gain", self.gain, 0, 1e6, above=True)


class LoRALinear(nn.Module):
    """y = W x + b + gain B A x, with W and b of a frozen linear layer. B starts at 0."""

    def __init__(self, linear: nn.Linear, config: FakeScoreConfig, draw: torch.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        rank = min(config.rank, linear.in_features, linear.out_features)
        self.weight = linear.weight
        self.bias = linear.bias
        self.gain = config.gain
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)
        with torch.no_grad():
            start = torch.randn(self.down.weight.shape, generator=draw) / linear.in_features**0.5
            self.down.weight.copy_(start)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear layer and its low-rank term."""
        return nn.functional.linear(x, self.weight, self.bias) + self.gain * self.up(self.down(x))


class LoRAModel(nn.Module):
    """Frozen ``base``, and a network that adds trainable low-rank terms to each linear layer. A call runs the latter.

    Both are submodules because engines that shard weights gather them by module: an engine of this module also serves
    calls of ``base``.
    """

    def __init__(self, base: nn.Module, config: FakeScoreConfig, seed: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        shared = {id(p): p for p in base.parameters()}
        self.adapted = copy.deepcopy(base, shared)
        for name, layer in list(self.adapted.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, own = name.rpartition(".")
                draw = generator(seed, f"adapter/{name}", 0)
                setattr(self.adapted.get_submodule(parent), own, LoRALinear(layer, config, draw))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with low-rank terms."""
        return self.adapted(*args, **kwargs)
