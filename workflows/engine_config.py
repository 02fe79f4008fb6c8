"""How a run is spread over processes, and how they compute."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run is spread over processes."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1  # what DeepSpeed shards: nothing, moments, + gradients, + weights
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network's arithmetic; weights and moments stay float32
    offload_optimizer: bool = False  # float32 weights and moments in CPU memory, updated there; ZeRO 1 to 3
    recompute: bool = False  # run layers again in the backward pass instead of keeping what is inside them
    compile: bool = False  # blocks through torch.compile; ZeRO 0 to 2
    sequence: int = 1  # processes that share the tokens of the same clips (Ulysses); divides workers and heads
    workers: int | tuple[int, int] = 2  # processes, one per GPU or sharing cores; (fewest, most): as there is room
    use_gpu: bool = False
    resource: str | None = None  # a custom Ray resource, one for every process: the machines meant for training
    max_failures: int = 2  # restarts from the latest checkpoint before the run is given up

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise ValueError(f"engine.workers is a number or [fewest, most], at least 1: got {self.workers}")
        if self.offload_optimizer and (self.kind == "torch" or self.zero_stage == 0):
            raise ValueError(
                "engine.offload_optimizer moves what ZeRO shards: with it, set engine.kind=deepspeed and "
                f"engine.zero_stage to 1, 2 or 3; got {self.kind}, {self.zero_stage}"
            )
        if self.sequence < 1 or self.fewest % self.sequence or (self.sequence > 1 and self.fewest != self.most):
            raise ValueError(
                f"engine.sequence {self.sequence} must divide engine.workers, a number: got {self.workers}"
            )
        if self.compile and (self.kind, self.zero_stage) == ("deepspeed", 3):
            raise ValueError(
                "engine.compile makes one piece of what ZeRO-3 gathers weight by weight: leave it off, or set "
                "engine.zero_stage to 2 or less"
            )

    @property
    def autocast(self) -> torch.dtype | None:
        """What networks compute in, if not float32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def fewest(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
