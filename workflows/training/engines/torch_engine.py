"""Engine in plain PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfcore.ema import ReplicatedWeights, WeightAccess
from mfcore.optim import OptimConfig, build_adamw
from mfcore.types import VelocityModel
from workflows.config.run import EngineConfig
from workflows.training.engines.gradients import (
    NonFiniteGradientDetector,
    flatten,
    gradient_or_zero,
    set_lr,
    trainable_parameters,
)
from workflows.training.engines.state import MOMENTS, ShardedStateReader, StateShard, shard_state
from workflows.utils import distributed


class TorchEngine:
    """Engine with torch AdamW; gradients are averaged over the ranks as one flat vector."""

    def __init__(self, module: nn.Module, optim: OptimConfig, config: EngineConfig) -> None:
        self._net = module
        self._optim = optim
        self._autocast = config.autocast
        self._trained = trainable_parameters(module)
        self._optimizer = build_adamw(module, optim)
        self._gradient_detector = NonFiniteGradientDetector(self._trained.values())
        self._steps = 0

    @property
    def module(self) -> VelocityModel:
        """The network, called through this engine."""
        return cast(VelocityModel, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        device = next(iter(self._trained.values())).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self._net(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss."""
        loss.backward()

    @property
    def has_non_finite_gradient(self) -> Tensor:
        """Boolean scalar: a gradient of this rank since the last step was not finite."""
        return self._gradient_detector.flag

    def step(self, lr: float) -> float:
        """Average the gradients, clip, update and clear them. Return the norm before clipping."""
        weights = list(self._trained.values())
        flat = distributed.all_reduce_mean(flatten([gradient_or_zero(p) for p in weights]))
        norm = flat.norm()
        flat *= (self._optim.clip / (norm + 1e-6)).clamp(max=1.0)
        for p, gradient in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
            p.grad = gradient.view_as(p)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._gradient_detector.clear()
        self._steps += 1
        return float(norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each trained parameter with its full float32 value."""
        yield from ((name, p.detach()) for name, p in self._trained.items())

    @property
    def frozen_weight_access(self) -> WeightAccess:
        """Access to the weights that are not trained."""
        return ReplicatedWeights()

    def discard_gradients(self) -> None:
        """Discard the gradients since the last step."""
        self._optimizer.zero_grad()
        self._gradient_detector.clear()

    def state_shard(self) -> StateShard:
        """Return a copy of this rank's shard of weights and moments."""
        return shard_state(self._tensors(), self._steps)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._trained.items():
            yield "weight", name, p.detach()
            for key in MOMENTS if p in self._optimizer.state else ():
                yield key, name, self._optimizer.state[p][key]

    def load(self, folder: Path, name: str) -> None:
        """Load the state of network ``name``."""
        state = ShardedStateReader(folder, name)
        state.check_shapes({n: p.shape for n, p in self._trained.items()})
        for key, p in self._trained.items():
            p.data.copy_(state.read("weight", key))
            if state.has("exp_avg", key):
                moments = {moment: state.read(moment, key).to(p.device) for moment in MOMENTS}
                self._optimizer.state[p] = {"step": torch.tensor(float(state.steps)), **moments}
        self._steps = state.steps
