"""Engines train one network on the ranks of a run: plain PyTorch or DeepSpeed.

Both keep float32 weights and moments; "bf16" runs the network under autocast. Both save the same state: complete
float32 tensors by parameter name, distributed over the ranks, as safetensors. So a run resumes under another engine,
ZeRO stage or number of ranks, and no pickle is read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mfcore.ema import WeightAccess
from mfcore.optim import OptimConfig
from mfcore.types import VelocityModel
from workflows.config.run import EngineConfig
from workflows.training.engines.deepspeed_engine import DeepSpeedEngine
from workflows.training.engines.state import StateShard
from workflows.training.engines.torch_engine import TorchEngine


class NonFiniteError(ValueError):
    """A loss or gradient is not finite. Raised on all ranks before the weights change."""


class Engine(Protocol):
    """One network and its optimizer on all ranks. Every method is called by all ranks together."""

    @property
    def module(self) -> VelocityModel:
        """The network, called through the wrapper of the engine."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss."""
        ...

    @property
    def has_non_finite_gradient(self) -> Tensor:
        """Boolean scalar: a gradient of this rank since the last step was not finite."""
        ...

    def step(self, lr: float) -> float:
        """Average the gradients over the ranks, clip, update and clear them. Return the norm before clipping."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each trained parameter with its full float32 value. All ranks must iterate to the end."""
        ...

    @property
    def frozen_weight_access(self) -> WeightAccess:
        """Access to the weights of the module that are not trained."""
        ...

    def discard_gradients(self) -> None:
        """Discard the gradients since the last step; nothing else changes."""
        ...

    def state_shard(self) -> StateShard:
        """Return a copy of this rank's shard of weights and moments."""
        ...

    def load(self, folder: Path, name: str) -> None:
        """Load the state of network ``name``, saved by any number of ranks."""
        ...


def build_engine(module: nn.Module, optim: OptimConfig, config: EngineConfig) -> Engine:
    """Return the engine of one network. Its weights must be equal on all ranks."""
    if config.kind == "torch":
        return TorchEngine(module, optim, config)
    return DeepSpeedEngine(module, optim, config)
