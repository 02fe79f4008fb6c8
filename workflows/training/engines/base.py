"""What trains one network on the ranks of a run: plain PyTorch, or DeepSpeed. The only file that imports deepspeed.

Both keep float32 weights and moments; "bf16" computes the network under autocast. Both save the same state: whole
float32 tensors by parameter name, every rank its share of the parameters, as safetensors. So a run resumes under
another engine, ZeRO stage or number of ranks, and nothing pickled is ever read.
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
    """A loss or gradient that is not a number, raised on every rank before the weights move."""


class Engine(Protocol):
    """One network, its optimizer, and the ranks they are spread over. Every method is called by all ranks together."""

    @property
    def module(self) -> VelocityModel:
        """The network; calls go through the engine's wrapper."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss."""
        ...

    @property
    def has_non_finite_gradient(self) -> Tensor:
        """Flag: a gradient of this rank, since the last step, was not finite."""
        ...

    def step(self, lr: float) -> float:
        """Average the gradients over the ranks, clip, update, clear. Returns the norm before clipping."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter with its full float32 value; all ranks must walk to the end."""
        ...

    @property
    def frozen_weight_access(self) -> WeightAccess:
        """Where the weights of the module that it does not train are kept."""
        ...

    def discard_gradients(self) -> None:
        """Forget the gradients since the last step, and leave everything else as it is."""
        ...

    def state_shard(self) -> StateShard:
        """A copy of this rank's share of weights and moments."""
        ...

    def load(self, folder: Path, name: str) -> None:
        """Read what any number of ranks saved."""
        ...


def build_engine(module: nn.Module, optim: OptimConfig, config: EngineConfig) -> Engine:
    """The engine of one network, whose weights must be equal on all ranks."""
    if config.kind == "torch":
        return TorchEngine(module, optim, config)
    return DeepSpeedEngine(module, optim, config)
