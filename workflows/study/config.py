"""Configuration of a study: network, clips, phases and measurements; presets."""

from dataclasses import dataclass, field, replace
from typing import get_args

from mfcore.ema import EmaConfig
from mfcore.errors import UserInputError, check_range
from mfcore.flow import TimeConfig
from mfcore.metrics.windows import parse_windows
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.lora import FakeScoreConfig
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig
from mfcore.solver import SamplerName
from mfcore.types import AUDIO, VIDEO
from workflows.study import latent_world


def _settings() -> MutualConfig:
    return MutualConfig(
        time=TimeConfig(shift={VIDEO: 1.0, AUDIO: 1.0}),
        finest=3,
        base="two_midpoints",
        strengths=(2,),
        rollout_steps=(4, 8),
        guidance=1.1,
        shortcut_weight=2.0,
        dmd_weight=2.0,
        real_until=450,
        free_from=500,
        fake_from=500,
        dmd_from=560,
        dmd_ramp=60,
    )


SAMPLING = ("guidance", "counts", "samplers", "clips", "seconds", "long_clips", "long_seconds", "windows")
"""Settings that training does not depend on."""

MAX_COUNT = 1_000_000  # of steps, clips, chunks and seconds
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of a study. Its results are a function of these and the seeds."""

    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            branches={m: BranchConfig(channels=c, data_std=0.5) for m, c in latent_world.CHANNELS.items()},
            dim=64,
            layers=3,
            heads=4,
            mlp_ratio=2.0,
            text_dim=latent_world.WORD_DIM,
            chunk_seconds=float(latent_world.CHUNK_SECONDS),
            window_chunks=4,
            local_start=True,
            chunk_phase=True,
            word_horizon_seconds=0.5,
        )
    )
    voices: int = latent_world.VOICES  # voices of the world
    joint_steps: int = 3000  # shared by all methods of a seed
    joint_batch: int = 16  # clips per step
    joint_chunks: tuple[int, ...] = (6, 10)  # clip lengths, drawn per step
    joint_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warm_up=50, final=0.05, clip=1.0))
    steps: int = 1000  # per method, from the joint network
    batch: int = 32  # clips per step
    chunks: tuple[int, ...] = (3, 6)  # short: cost of a rollout grows with its chunks
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.5e-3, warm_up=20, final=0.1, clip=1.0))
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    fake_ratio: float = 1.0  # learning rate over the student's, at one update per step
    fake_final: float = 0.1  # final over peak learning rate of the fake score, as for the student
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.99))
    method: MutualConfig = field(default_factory=_settings)
    guidance: float = 1.1  # of the guided multi-step mode
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 50)  # steps per chunk
    samplers: tuple[SamplerName, ...] = ("deterministic",)  # of the few-step mode
    clips: int = 128  # generated per score task
    seconds: float = 25.0  # length of a clip
    long_clips: int = 32  # clips with long_seconds
    long_seconds: float = 60.0  # length of long clips
    windows: str = "0-5,5-15,15-25,25-60"  # scored windows in seconds

    def __post_init__(self) -> None:
        self._check_ranges()
        if not 0 <= self.long_clips <= self.clips or self.long_seconds < self.seconds:
            raise UserInputError(
                f"long_clips={self.long_clips} of clips={self.clips}, long_seconds={self.long_seconds:g} after "
                f"seconds={self.seconds:g}: long_clips must be in 0..clips and long_seconds at least seconds"
            )
        if not self.counts or min(self.counts) < 1 or list(self.counts) != sorted(set(self.counts)):
            raise UserInputError(
                f"counts={list(self.counts)}: give distinct step counts in ascending order, each at least 1"
            )
        if not self.samplers or not set(self.samplers) <= set(get_args(SamplerName)):
            known = ", ".join(get_args(SamplerName))
            raise UserInputError(f"samplers={list(self.samplers)}: give at least one of {known}")
        longest = self.long_seconds if self.long_clips else self.seconds
        for window in parse_windows(self.windows):
            if window.end > longest:
                raise UserInputError(
                    f"windows: {window.name} ends after the longest clip ({longest:g} s). Raise long_seconds"
                )
            if window.end - window.start < 2 * latent_world.CHUNK_SECONDS:
                raise UserInputError(
                    f"windows: {window.name} is shorter than two chunks ({2 * latent_world.CHUNK_SECONDS} s)"
                )
        begins = max(self.method.real_until, self.method.free_from, self.method.fake_from, self.method.dmd_from)
        if begins >= self.steps:
            raise UserInputError(
                f"steps={self.steps}: the last phase begins at step {begins}. Raise steps, or lower "
                "method.real_until, free_from, fake_from and dmd_from"
            )

    def _check_ranges(self) -> None:
        for name in ("voices", "joint_steps", "joint_batch", "steps", "batch", "clips"):
            check_range(name, getattr(self, name), 1, MAX_COUNT)
        for name in ("joint_chunks", "chunks"):
            lengths: tuple[int, ...] = getattr(self, name)
            if not lengths:
                raise UserInputError(f"{name}=[]: give at least one clip length in chunks")
            for length in lengths:
                check_range(name, length, 1, MAX_COUNT)
        for name in ("seconds", "long_seconds", "fake_ratio"):
            check_range(name, getattr(self, name), 0, MAX_COUNT, above=True)
        check_range("fake_final", self.fake_final, 0, 1)
        check_range("guidance", self.guidance, 0, MAX_GUIDANCE)

    @property
    def shift(self) -> dict[str, float]:
        """Return the time shift per modality."""
        return self.method.time.shift


def _quick() -> StudyConfig:
    """Return a study of minutes, for the direction of effects only."""
    whole = StudyConfig()
    return replace(
        whole,
        joint_steps=700,
        steps=120,
        method=replace(whole.method, real_until=40, free_from=50, fake_from=50, dmd_from=80, dmd_ramp=20),
        counts=(1, 4, 50),
        clips=16,
        long_clips=0,
        windows="0-5,15-25",
    )


def study_preset(name: str) -> StudyConfig:
    """Return a preset by name. Raises ValueError for an unknown name."""
    if name == "toy-study":
        return StudyConfig()
    if name == "quick":
        return _quick()
    raise UserInputError(f"unknown study preset {name!r}: choose toy-study or quick")
