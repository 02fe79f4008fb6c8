"""The fake score as low-rank terms on the average network (METHOD 6): one set of base weights, two networks.

The teacher is the average itself, the fake score the average plus trainable low-rank terms, so the two differ by
these terms alone, and no second copy of weights, gradients and moments is held. Both are module trees over the *same*
frozen parameters: when the average moves, the base of the fake score has moved. No switch turns the terms on and off,
so either network may be run again at any time, in a backward pass too (recomputed layers).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfcore.rng import generator


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig:
    """What the fake score of the mutual stage is."""

    rank: int | None = None  # of its terms on the average network; None: a full copy of the student
    gain: float = 8.0  # on the terms; width / (2 rank) follows about as fast as a full copy at its learning rate

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"fake.rank must be at least 1, or null for a full copy of the network; got {self.rank}")
        if self.gain <= 0:
            raise ValueError(f"fake.gain must be positive, got {self.gain}")


class LoRALinear(nn.Module):
    """y = W x + b + gain B A x, with W and b of a frozen linear layer. B starts at 0."""

    def __init__(self, linear: nn.Linear, config: FakeScoreConfig, draw: torch.Generator) -> None:
        super().__init__()
        assert config.rank is not None
        rank = min(config.rank, linear.in_features, linear.out_features)
        self.weight, self.bias, self.gain = linear.weight, linear.bias, config.gain
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)
        with torch.no_grad():
            start = torch.randn(self.down.weight.shape, generator=draw) / linear.in_features**0.5
            self.down.weight.copy_(start)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.gain * self.up(self.down(x))


class LoRAModel(nn.Module):
    """``base``, frozen, and a network that adds low-rank terms to each of its linear layers; a call runs the latter.

    Both stand below this module because engines that shard weights gather them by module: an engine of this module
    serves calls of ``base`` as well. Trainable are the terms only.
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
        return self.adapted(*args, **kwargs)
