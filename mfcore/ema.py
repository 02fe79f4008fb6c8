"""Exponential moving average of a network's weights: a runnable, frozen float32 copy.

The average is kept in float32 whatever the network computes in: in bfloat16 a decay of 0.99 never moves a weight
(METHOD 6). It is a module, not a list of tensors, because the objectives call it as a teacher.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average follows the network."""

    decay: float = 0.999  # share of the old average kept at every step
    warm_up: bool = True  # follow faster in the first steps: decay at most (1 + step) / (10 + step)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"the EMA decay must be in [0, 1), got {self.decay}")


def decay_at(config: EmaConfig, step: int) -> float:
    """Share of the old average that update number ``step`` (from 0) keeps."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warm_up else config.decay


class Ema:
    """The average of a network, as a network."""

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self._weights = dict(self.module.named_parameters())

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Move towards ``weights``, (name, tensor) pairs of every parameter of the network."""
        keep = decay_at(self.config, step)
        seen = 0
        for name, weight in weights:
            self._weights[name].lerp_(weight.detach().float(), 1 - keep)
            seen += 1
        assert seen == len(self._weights), f"the average holds {len(self._weights)} weights, was given {seen}"

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict: names and shapes must be those of the network."""
        if state.keys() != self._weights.keys():
            odd = sorted(state.keys() ^ self._weights.keys())[:3]
            raise ValueError(f"this is the average of another network: {', '.join(odd)} ... stand on one side only")
        for name, weight in self._weights.items():
            weight.copy_(state[name])
