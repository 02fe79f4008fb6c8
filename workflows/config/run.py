"""Configuration of a training run. Parts of it are defined next to the code that they configure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from mfcore.ema import EmaConfig
from mfcore.errors import UserInputError, check_range
from mfcore.model.config import ModelConfig
from mfcore.model.lora import FakeScoreConfig
from mfcore.objectives.flow_matching import FlowMatchingConfig
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig
from workflows.config.stage_names import Stage

DEFAULT_HELD_OUT_SHARE = 0.1  # of the sources


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Interval, number and storage of the checkpoints of a run."""

    every: int  # samples between checkpoints
    keep: int = 2  # number of latest complete checkpoints that are kept
    to: str | None = None  # path or URI (s3://bucket/prefix) for checkpoints by run name; None: the run directory

    def __post_init__(self) -> None:
        check_range("checkpoint.every", self.every, 1, 10**12)
        check_range("checkpoint.keep", self.keep, 1, 10**6)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Batches of a run, and the dropout of their conditions."""

    batch: int  # clips per optimizer step, over all ranks
    micro: int | None = None  # clips per rank and backward pass; None: the whole rank shard at once
    chunks: tuple[int, int]  # fewest and most chunks of a training clip, drawn for every step
    shuffle: int = 32  # batches of a shuffle window; a rank holds its rows of one window in memory
    held_out: float = DEFAULT_HELD_OUT_SHARE  # share of the sources kept for evaluation
    held_out_clips: int = 16  # clips of an evaluation
    drop_both: float = 0.1  # chance that caption and transcript are both hidden (guidance)
    drop_caption: float = 0.05  # chance that the caption alone is hidden
    drop_words: float = 0.05  # chance that the transcript alone is hidden
    drop_voice: float = 0.5  # chance that no reference voice is given
    prefetch: int = 2  # batches prepared ahead
    whitening: Mapping[str, float] = field(default_factory=dict[str, float])  # exponent of the channel
    # deviation that is divided out, per modality; default 1: each channel has deviation 1. Later stages inherit it.

    def __post_init__(self) -> None:
        for name, most in (("batch", 10**6), ("micro", 10**6), ("shuffle", 10**6), ("held_out_clips", 10**6)):
            check_range(f"data.{name}", getattr(self, name), 1, most)
        check_range("data.prefetch", self.prefetch, 1, 1000)
        if not 1 <= self.chunks[0] <= self.chunks[1]:
            raise UserInputError(f"data.chunks must be (fewest, most) with 1 <= fewest <= most, got {self.chunks}")
        check_range("data.held_out", self.held_out, 0, 0.99, above=True)
        for modality, exponent in self.whitening.items():
            check_range(f"data.whitening.{modality}", exponent, 0, 1)
        chances = (self.drop_both, self.drop_caption, self.drop_words, self.drop_voice)
        if not all(0 <= chance <= 1 for chance in chances) or sum(chances[:3]) > 1:
            raise UserInputError(
                f"data.drop_both, drop_caption, drop_words and drop_voice are {chances}: each must be in [0, 1], "
                "and the first three must sum to at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Engine, precision and workers of a run."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"  # training engine
    zero_stage: Literal[0, 1, 2, 3] = 1  # what DeepSpeed shards: nothing, moments, + gradients, + weights
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network's arithmetic; weights and moments stay float32
    offload_optimizer: bool = False  # float32 weights and moments in CPU memory, updated there; ZeRO 1 to 3
    recompute: bool = False  # recompute activations in the backward pass instead of storing them
    compile: bool = False  # blocks through torch.compile; ZeRO 0 to 2
    sequence: int = 1  # processes that share the tokens of the same clips (Ulysses); divides workers and heads
    workers: int | tuple[int, int] = 2  # one per GPU, or CPU processes that share the cores; (fewest, most): elastic
    use_gpu: bool = False  # one GPU per worker
    resource: str | None = None  # custom Ray resource that each worker requires, to select machines
    max_failures: int = 2  # restarts from the latest checkpoint before the run fails

    def __post_init__(self) -> None:
        check_range("engine.workers", self.max_workers, 1, 10**5)
        check_range("engine.sequence", self.sequence, 1, 1024)
        check_range("engine.max_failures", self.max_failures, -1, 10**6)
        if not 1 <= self.min_workers <= self.max_workers:
            raise UserInputError(f"engine.workers is a number or [fewest, most], at least 1: got {self.workers}")
        if self.offload_optimizer and (self.kind == "torch" or self.zero_stage == 0):
            raise UserInputError(
                f"engine.offload_optimizer needs ZeRO: got {self.kind}, stage {self.zero_stage}. Set "
                "engine.kind=deepspeed and engine.zero_stage to 1, 2 or 3"
            )
        if self.min_workers % self.sequence or (self.sequence > 1 and self.min_workers != self.max_workers):
            raise UserInputError(
                f"engine.sequence {self.sequence} must divide engine.workers, a number: got {self.workers}"
            )
        if self.compile and (self.kind, self.zero_stage) == ("deepspeed", 3):
            raise UserInputError(
                "engine.compile cannot fuse weights that ZeRO-3 gathers one by one: set engine.compile=false, or "
                "engine.zero_stage to 2 or less"
            )

    @property
    def autocast(self) -> torch.dtype | None:
        """Autocast type of the networks, None for float32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def min_workers(self) -> int:
        """Fewest workers; equal to ``max_workers`` if their number is fixed."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def worker_resources(self, cluster_cpus: float) -> dict[str, float]:
        """Return the Ray resources of one worker on a cluster with that many CPUs.

        Workers of a fixed number share the CPUs if these are fewer. Elastic workers need whole CPUs: Ray Train cannot
        count how many fractions fit on a machine.
        """
        is_elastic = self.min_workers != self.max_workers
        resources = {"CPU": 1.0 if is_elastic else min(1.0, cluster_cpus / self.max_workers)}
        if self.use_gpu:
            resources["GPU"] = 1.0
        if self.resource:
            resources[self.resource] = 1.0
        return resources


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of one run; with the dataset and the parent runs it determines every number."""

    stage: Stage  # training stage; set by --stage
    seed: int = 0  # of initialization and of every random draw
    steps: int  # optimizer steps of the stage
    model: ModelConfig
    init_video: str | None = None  # diffusers folder of Wan video weights to start from; stage video
    objective: FlowMatchingConfig | MutualConfig
    optim: OptimConfig
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)  # mutual only
    fake_optim: OptimConfig | None = None  # optimizer of the fake score; mutual only
    ema: EmaConfig = field(default_factory=EmaConfig)
    data: DataConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig
    log_every: int = 10  # steps between log lines
    eval_every: int = 100  # steps between held-out evaluations; also before the first and after the last step
    sample_every: int = 0  # samples seen between sample reports; 0: only one, after the end
    sample_clips: int = 2  # held-out clips per sample report
    sample_weights: tuple[str, ...] = ()  # feature models of the metrics, KIND=PATH; see `mfctl evaluate --weights`
    skip_nonfinite: int = 0  # steps with a non-finite loss or gradient that are skipped before the run fails

    def __post_init__(self) -> None:
        if self.init_video and self.stage != "video":
            raise UserInputError(
                f"init_video is for stage video: stage {self.stage} starts from finished runs (--from)"
            )
        check_range("seed", self.seed, 0, 2**63 - 1)
        for name in ("steps", "log_every", "eval_every"):
            check_range(name, getattr(self, name), 1, 10**9)
        check_range("sample_every", self.sample_every, 0, 10**12)
        check_range("sample_clips", self.sample_clips, 1, 10**4)
        check_range("skip_nonfinite", self.skip_nonfinite, 0, 10**9)
        mutual = isinstance(self.objective, MutualConfig)
        if mutual != (self.stage == "mutual"):
            raise UserInputError(f"stage {self.stage} does not train with {type(self.objective).__name__}")
        if mutual and self.fake_optim is None:
            raise UserInputError("stage mutual needs fake_optim, the optimizer of the fake-score network")
        if isinstance(self.objective, MutualConfig) and self.objective.share_history and self.fake.rank is None:
            raise UserInputError(
                "objective.share_history lets the fake score use the teacher's keys and values, which a full copy does "
                "not match: set fake.rank, or objective.share_history=false"
            )
        if self.data.batch < self.data_parallel_size * self.rows_per_cycle:
            raise UserInputError(
                f"data.batch {self.data.batch} is too small for engine.workers {self.engine.max_workers}: "
                f"each of them needs at least {self.rows_per_cycle} clips"
            )
        if self.model.heads % self.engine.sequence or self.model.key_heads % self.engine.sequence:
            raise UserInputError(
                f"engine.sequence {self.engine.sequence} splits attention heads: it must divide model.heads "
                f"{self.model.heads} and model.kv_heads {self.model.key_heads}"
            )
        if self.data.batch % self.rows_per_cycle or (self.data.micro or self.rows_per_cycle) % self.rows_per_cycle:
            raise UserInputError(
                f"data.batch {self.data.batch} and data.micro {self.data.micro} must hold whole cycles of the "
                f"{self.rows_per_cycle} row kinds of the mutual stage: make them multiples of {self.rows_per_cycle}"
            )

    @property
    def data_parallel_size(self) -> int:
        """Largest number of batch shards that are computed in parallel."""
        return self.engine.max_workers // self.engine.sequence

    @property
    def rows_per_cycle(self) -> int:
        """Clips that stay together on one rank and in one backward pass.

        In the mutual stage the sample number selects the row kind, and losses are means over the rows of a kind. Whole
        cycles of kinds make the mean of shard means equal to the mean of the batch.
        """
        return len(self.objective.rows) if isinstance(self.objective, MutualConfig) else 1
