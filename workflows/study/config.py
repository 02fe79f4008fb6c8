"""Sizes of a study: one network, its clips, how long each phase trains, and what is measured."""

from dataclasses import dataclass, field, replace

from mfcore.ema import EmaConfig
from mfcore.flow import TimeConfig
from mfcore.metrics.windows import parse_windows
from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.lora import FakeScoreConfig
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig
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


SAMPLING = ("guidance", "counts", "clips", "seconds", "long_clips", "long_seconds", "windows")
"""Settings that no training depends on."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything the numbers of a study are a function of, beside its seeds."""

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
    voices: int = latent_world.VOICES
    joint_steps: int = 3000  # shared by all methods of a seed
    joint_batch: int = 16  # clips per step
    joint_chunks: tuple[int, ...] = (6, 10)  # of each, drawn per step
    joint_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warm_up=50, final=0.05, clip=1.0))
    steps: int = 1000  # of every method, from the joint network
    batch: int = 32
    chunks: tuple[int, ...] = (3, 6)  # short: a roll-out costs by the chunk, and choices of a clip fall in its first
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.5e-3, warm_up=20, final=0.1, clip=1.0))
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)
    fake_ratio: float = 1.0  # learning rate of the fake score over the student's; one update per step
    fake_final: float = 0.1  # its rate at the end over its peak: as the student's, so that it lags no more
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.99))
    method: MutualConfig = field(default_factory=_settings)
    guidance: float = 1.1  # of the multi-step mode where it is asked with guidance
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 50)  # steps per chunk
    clips: int = 128  # generated per setting
    seconds: float = 25.0  # of each
    long_clips: int = 32  # those of them that go on
    long_seconds: float = 60.0
    windows: str = "0-5,5-15,15-25,25-60"

    def __post_init__(self) -> None:
        if self.voices < 1:
            raise ValueError(f"voices={self.voices}: the world needs at least one")
        if not 0 <= self.long_clips <= self.clips or self.long_seconds < self.seconds:
            raise ValueError(
                f"{self.long_clips} of {self.clips} clips go on from {self.seconds:g} to {self.long_seconds:g} s: "
                "no more can go on than there are, and none backwards"
            )
        if not self.counts or min(self.counts) < 1 or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts={list(self.counts)}: give numbers of steps per chunk, each once, in rising order")
        longest = self.long_seconds if self.long_clips else self.seconds
        for window in parse_windows(self.windows):
            if window.end > longest:
                raise ValueError(f"windows: {window.name} ends after the longest clip, at {longest:g} s")
            if window.end - window.start < 2 * latent_world.CHUNK_SECONDS:
                raise ValueError(
                    f"windows: {window.name} is shorter than two chunks, {2 * latent_world.CHUNK_SECONDS} s"
                )
        begins = max(self.method.real_until, self.method.free_from, self.method.fake_from, self.method.dmd_from)
        if begins >= self.steps:
            raise ValueError(
                f"steps={self.steps}: the method's last phase begins at step {begins}; set method.real_until, "
                "free_from, fake_from and dmd_from with it"
            )

    @property
    def shift(self) -> dict[str, float]:
        return self.method.time.shift


def _quick() -> StudyConfig:
    """Directions only: a joint network and methods that have trained for minutes."""
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
    """Sizes by name. ValueError for an unknown one."""
    if name == "toy-study":
        return StudyConfig()
    if name == "quick":
        return _quick()
    raise ValueError(f"no study preset {name!r}: choose toy-study or quick")
