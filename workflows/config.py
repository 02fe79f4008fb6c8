"""The whole configuration of a training run. Parts stand beside what they configure; this file puts them together."""

from dataclasses import dataclass, field
from typing import Literal

from mfcore.ema import EmaConfig
from mfcore.model.adapter import FakeConfig
from mfcore.model.config import ModelConfig
from mfcore.objectives.flow_matching import FlowMatchingConfig
from mfcore.objectives.recipe import MutualConfig
from mfcore.optim import OptimConfig
from workflows.data import DataConfig
from workflows.engine_config import EngineConfig

Stage = Literal["video", "audio", "joint", "mutual"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and how much of it is kept."""

    every: int  # samples between checkpoints
    keep: int = 2  # latest complete checkpoints that stay
    to: str | None = None  # path or URI (s3://bucket/prefix) that keeps them, by the name of the run; None: its folder

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
    init_video: str | None = None  # folder of Wan's video weights to start from, as diffusers saves them; stage video
    objective: FlowMatchingConfig | MutualConfig
    optim: OptimConfig
    fake: FakeConfig = field(default_factory=FakeConfig)  # what the fake score is; mutual only
    fake_optim: OptimConfig | None = None  # of the fake-score network; mutual only
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig
    log_every: int = 10  # steps between log lines
    eval_every: int = 100  # steps between held-out evaluations (also made before the first and after the last step)
    sample_every: int = 0  # samples seen between looks at generated clips (and one at the end); 0: only after the end
    sample_clips: int = 2  # held-out clips of each look
    sample_weights: tuple[str, ...] = ()  # networks that measure them, as KIND=PLACE; see `mfctl evaluate --weights`
    skip_nonfinite: int = 0  # steps that may be left out because a loss or gradient is not finite, before the run stops

    def __post_init__(self) -> None:
        if self.init_video and self.stage != "video":
            raise ValueError(f"init_video is for stage video: stage {self.stage} starts from finished runs (--from)")
        if self.sample_every < 0 or self.sample_clips < 1:
            raise ValueError(
                f"sample_every must be at least 0 and sample_clips at least 1, got {self.sample_every}, "
                f"{self.sample_clips}"
            )
        if self.steps < 1 or self.log_every < 1 or self.eval_every < 1 or self.skip_nonfinite < 0:
            raise ValueError("steps, log_every and eval_every must be at least 1, skip_nonfinite at least 0")
        mutual = isinstance(self.objective, MutualConfig)
        if mutual != (self.stage == "mutual"):
            raise ValueError(f"stage {self.stage} does not train with {type(self.objective).__name__}")
        if mutual and self.fake_optim is None:
            raise ValueError("stage mutual needs fake_optim, the optimizer of the fake-score network")
        if isinstance(self.objective, MutualConfig) and self.objective.share_history and self.fake.rank is None:
            raise ValueError(
                "objective.share_history gives the fake score the teacher's keys and values, which a full copy drifts "
                "away from: set fake.rank, or objective.share_history=false"
            )
        if self.data.batch < self.shares * self.unit:
            raise ValueError(
                f"data.batch {self.data.batch} is too small for engine.workers {self.engine.most}: each of them needs "
                f"at least {self.unit} of its clips"
            )
        if self.model.heads % self.engine.sequence or self.model.key_heads % self.engine.sequence:
            raise ValueError(
                f"engine.sequence {self.engine.sequence} shares out heads: it must divide model.heads "
                f"{self.model.heads} and model.kv_heads {self.model.key_heads}"
            )
        if self.data.batch % self.unit or (self.data.micro or self.unit) % self.unit:
            raise ValueError(
                f"data.batch {self.data.batch} and data.micro {self.data.micro} must hold whole cycles of the "
                f"{self.unit} row kinds of the mutual stage: make them multiples of {self.unit}"
            )

    @property
    def shares(self) -> int:
        """Parts of the batch that are computed side by side, at most."""
        return self.engine.most // self.engine.sequence

    @property
    def unit(self) -> int:
        """Clips that stay together on one rank and in one backward pass.

        Mutual: row kinds go by sample number, and their losses are means over the rows of a kind. With whole cycles of
        kinds everywhere, means over parts of the batch combine into the mean over all of it.
        """
        return len(self.objective.rows) if isinstance(self.objective, MutualConfig) else 1

    @property
    def total_samples(self) -> int:
        return self.steps * self.data.batch
