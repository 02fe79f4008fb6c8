"""The whole configuration of a training run. Parts stand beside what they configure; this file puts them together."""

from dataclasses import dataclass, field
from typing import Literal

from mfcore.ema import EmaConfig
from mfcore.model.config import ModelConfig
from mfcore.objectives.flow_matching import FlowMatchingConfig
from mfcore.objectives.mutual import MutualConfig
from mfcore.optim import OptimConfig
from workflows.data import DataConfig
from workflows.engine import EngineConfig

Stage = Literal["video", "audio", "joint", "mutual"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and how much of it is kept."""

    every: int  # samples between checkpoints
    keep: int = 2  # latest complete checkpoints that stay

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every and checkpoint.keep must be at least 1, got {self.every}, {self.keep}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: with the dataset and the runs it starts from, it determines every number."""

    stage: Stage
    seed: int = 0
    steps: int  # optimizer steps of the stage
    model: ModelConfig
    objective: FlowMatchingConfig | MutualConfig
    optim: OptimConfig
    fake_optim: OptimConfig | None = None  # of the fake-score network; mutual only
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig
    log_every: int = 10  # steps between log lines
    eval_every: int = 100  # steps between held-out evaluations (also made before the first and after the last step)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1 or self.eval_every < 1:
            raise ValueError("steps, log_every and eval_every must be at least 1")
        mutual = isinstance(self.objective, MutualConfig)
        if mutual != (self.stage == "mutual"):
            raise ValueError(f"stage {self.stage} does not train with {type(self.objective).__name__}")
        if mutual and self.fake_optim is None:
            raise ValueError("stage mutual needs fake_optim, the optimizer of the fake-score network")
        if self.data.batch % self.engine.workers:
            raise ValueError(
                f"data.batch {self.data.batch} is not a multiple of engine.workers "
                f"{self.engine.workers}: change one of them"
            )
        if isinstance(self.objective, MutualConfig):
            self._check_cycle(len(self.objective.rows))

    def _check_cycle(self, cycle: int) -> None:
        """Row kinds go by sample number: every backward pass of every rank must hold whole cycles of them."""
        rows = self.data.micro or self.data.batch // self.engine.workers
        if rows % cycle:
            raise ValueError(
                f"a backward pass of {rows} clips does not hold whole cycles of the {cycle} row kinds of the mutual "
                f"stage: make data.batch / engine.workers (or data.micro) a multiple of {cycle}"
            )

    @property
    def total_samples(self) -> int:
        return self.steps * self.data.batch
