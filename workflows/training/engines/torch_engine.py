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
    """Plain PyTorch: gradients as one flat vector, averaged over the ranks, torch AdamW."""

    def __init__(self, module: nn.Module, optim: OptimConfig, config: EngineConfig) -> None:
        self._net = module
        self._optim = optim
        self._autocast = config.autocast
        self._trained = trainable_parameters(module)
        self._optimizer = build_adamw(module, optim)
        self._watch = NonFiniteGradientDetector(self._trained.values())
        self._steps = 0

    @property
    def module(self) -> VelocityModel:
        return cast(VelocityModel, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        device = next(iter(self._trained.values())).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self._net(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @property
    def has_non_finite_gradient(self) -> Tensor:
        return self._watch.flag

    def step(self, lr: float) -> float:
        mine = list(self._trained.values())
        flat = distributed.all_reduce_mean(flatten([gradient_or_zero(p) for p in mine]))
        norm = flat.norm()
        flat *= (self._optim.clip / (norm + 1e-6)).clamp(max=1.0)
        for p, gradient in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            p.grad = gradient.view_as(p)
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._watch.clear()
        self._steps += 1
        return float(norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self._trained.items())

    @property
    def frozen_weight_access(self) -> WeightAccess:
        return ReplicatedWeights()

    def discard_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._watch.clear()

    def state_shard(self) -> StateShard:
        return shard_state(self._tensors(), self._steps)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._trained.items():
            yield "weight", name, p.detach()
            for key in MOMENTS if p in self._optimizer.state else ():
                yield key, name, self._optimizer.state[p][key]

    def load(self, folder: Path, name: str) -> None:
        state = ShardedStateReader(folder, name)
        state.check_shapes({n: p.shape for n, p in self._trained.items()})
        for key, p in self._trained.items():
            p.data.copy_(state.read("weight", key))
            if state.has("exp_avg", key):
                moments = {moment: state.read(moment, key).to(p.device) for moment in MOMENTS}
                self._optimizer.state[p] = {"step": torch.tensor(float(state.steps)), **moments}
        self._steps = state.steps
