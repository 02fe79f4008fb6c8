"""Exponential moving average (EMA) of the weights of a network, as a frozen float32 copy.

The average is float32 even for a bfloat16 network: in bfloat16 a decay of 0.99 never moves a weight (METHOD 6). It is
a module, not a list of tensors, because the objectives call it as a teacher.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mfcore.errors import UserInputError
from mfcore.types import VelocityModel


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Decay of the average."""

    decay: float = 0.999  # share of the old average that each update keeps
    warm_up: bool = True  # faster in the first steps: decay at most (1 + step) / (10 + step)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserInputError(f"the EMA decay must be in [0, 1), got {self.decay}")


def ema_decay(config: EmaConfig, step: int) -> float:
    """Return the share of the old average that update number ``step`` (from 0) keeps."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warm_up else config.decay


class WeightAccess(Protocol):
    """Access to frozen weights, which an engine may shard over ranks. All ranks must call it together."""

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the parts of ``p`` on this rank, each with the same part of ``value``, a whole weight."""
        ...

    def value(self, p: nn.Parameter) -> Tensor:
        """Return the whole weight."""
        ...


class ReplicatedWeights:
    """Weights that are whole on every rank."""

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the whole weight with the whole value."""
        return [(p, value)]

    def value(self, p: nn.Parameter) -> Tensor:
        """Return the weight without gradient."""
        return p.detach()


class Ema:
    """Average of a network, as a network. ``autocast``: dtype of its forward pass; None: float32."""

    def __init__(self, module: nn.Module, config: EmaConfig, autocast: torch.dtype | None = None) -> None:
        self.config = config
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self.storage: WeightAccess = ReplicatedWeights()
        self._autocast = autocast
        self._weights = dict(self.module.named_parameters())

    @property
    def model(self) -> VelocityModel:
        """Averaged network as a teacher, run with ``autocast``."""
        return cast(VelocityModel, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        device = next(iter(self._weights.values())).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Update with ``weights``, (name, tensor) pairs of all parameters of the network."""
        keep = ema_decay(self.config, step)
        count = 0
        for name, weight in weights:
            for own, new in self.storage.places(self._weights[name], weight.detach().float()):
                own.lerp_(new, 1 - keep)
            count += 1
        assert count == len(self._weights), f"the average has {len(self._weights)} weights, got {count}"

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights, whole. All ranks must exhaust the iterator."""
        yield from ((name, self.storage.value(p)) for name, p in self._weights.items())

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights by name."""
        return dict(self.weights())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load an average. Raises ValueError if its names differ from those of the network."""
        if state.keys() != self._weights.keys():
            names = sorted(state.keys() ^ self._weights.keys())[:3]
            raise UserInputError(
                f"this is the average of another network: {', '.join(names)} ... are missing or unknown"
            )
        for name, weight in self._weights.items():
            for own, new in self.storage.places(weight, state[name]):
                own.copy_(new)
