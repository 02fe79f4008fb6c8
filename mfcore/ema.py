"""Exponential moving average of a network's weights: a runnable, frozen float32 copy.

The average is kept in float32 whatever the network computes in: in bfloat16 a decay of 0.99 never moves a weight
(METHOD 6). It is a module, not a list of tensors, because the objectives call it as a teacher.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mfcore.types import VelocityModel


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average follows the network."""

    decay: float = 0.999  # share of the old average kept at every step
    warm_up: bool = True  # follow faster in the first steps: decay at most (1 + step) / (10 + step)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"the EMA decay must be in [0, 1), got {self.decay}")


def ema_decay(config: EmaConfig, step: int) -> float:
    """Share of the old average that update number ``step`` (from 0) keeps."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warm_up else config.decay


class WeightAccess(Protocol):
    """Where frozen weights are kept: an engine may hold a part of each on every rank. Called by all ranks together."""

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """What this rank keeps of ``p``, each piece beside that piece of ``value``, a whole weight."""
        ...

    def value(self, p: nn.Parameter) -> Tensor:
        """The whole weight."""
        ...


class ReplicatedWeights:
    """Every rank keeps everything."""

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return [(p, value)]

    def value(self, p: nn.Parameter) -> Tensor:
        return p.detach()


class Ema:
    """The average of a network, as a network. ``autocast``: the type it computes in, if not float32."""

    def __init__(self, module: nn.Module, config: EmaConfig, autocast: torch.dtype | None = None) -> None:
        self.config = config
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self.storage: WeightAccess = ReplicatedWeights()
        self._autocast = autocast
        self._weights = dict(self.module.named_parameters())

    @property
    def model(self) -> VelocityModel:
        """The network as a teacher, computing in the same type as the networks it teaches."""
        return cast(VelocityModel, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        device = next(iter(self._weights.values())).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Move towards ``weights``, (name, tensor) pairs of every parameter of the network."""
        keep = ema_decay(self.config, step)
        seen = 0
        for name, weight in weights:
            for mine, theirs in self.storage.places(self._weights[name], weight.detach().float()):
                mine.lerp_(theirs, 1 - keep)
            seen += 1
        assert seen == len(self._weights), f"the average holds {len(self._weights)} weights, was given {seen}"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole; all ranks must walk to the end."""
        yield from ((name, self.storage.value(p)) for name, p in self._weights.items())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.weights())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict: names and shapes must be those of the network."""
        if state.keys() != self._weights.keys():
            odd = sorted(state.keys() ^ self._weights.keys())[:3]
            raise ValueError(f"this is the average of another network: {', '.join(odd)} ... stand on one side only")
        for name, weight in self._weights.items():
            for mine, theirs in self.storage.places(weight, state[name]):
                mine.copy_(theirs)
