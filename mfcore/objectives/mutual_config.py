"""Configuration of the mutual step and of its phases."""

from dataclasses import dataclass
from typing import Literal, get_args

from mfcore.errors import UserInputError, check_range
from mfcore.flow import TimeConfig
from mfcore.objectives.shortcut import BaseRule
from mfcore.solver import SamplerName

RowKind = Literal["real", "coupled", "free", "literal", "forced"]
"""Kind of history of a row, which determines its loss terms; see ``mutual.py``."""


@dataclass(frozen=True, kw_only=True)
class MutualConfig:
    """Losses, histories and phases of the mutual step. Phases are counted in optimizer steps of the stage."""

    time: TimeConfig
    rows: tuple[RowKind, ...] = ("real", "free", "coupled", "free")  # by sample number, cyclic
    finest_rows: tuple[bool, ...] = (True, False, False, True)  # ShortCut at the finest level, same cycle
    finest: int = 5  # finest ShortCut level: 2^finest intervals
    depth_power: float = 1.0  # below 1, coarse levels near the finest are drawn more often
    strengths: tuple[int, ...] = (3, 4, 5)  # coupled history at s = shift(2^-k), k drawn per step
    rollout_steps: tuple[int, ...] = (4, 8)  # few-step calls per chunk of free history, drawn per step
    rollout_sampler: SamplerName = "deterministic"  # of free history and of the samples for DMD
    guidance: float = 2.0  # weight of guidance, trained into the few-step mode
    shortcut_weight: float = 2 / 3  # of the ShortCut loss
    dmd_weight: float = 1 / 3  # of the DMD loss
    dmd_floor: float = 1e-3  # lower bound of the normalizer of the DMD gradient
    trust_label: bool = True  # label history with its strength
    base: BaseRule = "midpoint"  # ShortCut target at the finest level
    online_targets: bool = False  # ablation: targets by the student instead of its EMA
    jump_exit: bool = False  # ablation: end the rollout by one call instead of the schedule
    fake_updates: int = 1  # updates of the fake score per step, on the same rollouts at new noise levels
    share_history: bool = False  # the fake score reads the teacher's KV cache; valid for a low-rank fake score only
    real_until: int = 0  # ShortCut on real history only, before this step
    free_from: int = 0  # free history from this step on (before: such rows are coupled)
    fake_from: int = 0  # the fake score learns from this step on
    dmd_from: int = 0  # DMD trains the student from this step on
    dmd_ramp: int = 1  # steps of the linear warmup of the DMD weight

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.finest_rows):
            raise UserInputError("rows and finest_rows describe one cycle: give them equal lengths")
        if not self.rows or not self.strengths or not self.rollout_steps:
            raise UserInputError("rows, strengths and rollout_steps need at least one entry each")
        check_range("finest", self.finest, 1, 16)
        check_range("strengths", min(self.strengths), 0, self.finest)
        check_range("rollout_steps", min(self.rollout_steps), 1, 2**self.finest)
        check_range("depth_power", self.depth_power, 0, 1, above=True)
        check_range("guidance", self.guidance, 0, 100)
        check_range("shortcut_weight", self.shortcut_weight, 0, 1e6)
        check_range("dmd_weight", self.dmd_weight, 0, 1e6)
        check_range("dmd_floor", self.dmd_floor, 0, 1e6, above=True)
        check_range("fake_updates", self.fake_updates, 1, 1000)
        for name in ("real_until", "free_from", "fake_from", "dmd_from"):
            check_range(name, getattr(self, name), 0, 10**9)
        check_range("dmd_ramp", self.dmd_ramp, 1, 10**9)
        if max(self.strengths) > self.finest:
            raise UserInputError(
                f"strengths {self.strengths} exceed the ShortCut depth: use values up to finest={self.finest}"
            )
        if any(s & (s - 1) or s > 2**self.finest for s in self.rollout_steps):
            raise UserInputError(
                f"rollout_steps {self.rollout_steps}: ShortCut trains powers of two up to {2**self.finest} steps"
            )
        if self.rollout_sampler not in get_args(SamplerName):
            known = ", ".join(get_args(SamplerName))
            raise UserInputError(f"rollout_sampler {self.rollout_sampler!r}: unknown. Use one of {known}.")
        if "forced" in self.rows and {"free", "literal"} & set(self.rows):
            raise UserInputError(
                f"rows {self.rows}: forced rows cut the loop that free and literal rows close. Use one of them"
            )
        if self.dmd_from < self.fake_from:
            raise UserInputError(
                f"dmd_from {self.dmd_from}: the fake score must train first. Use fake_from={self.fake_from} or later"
            )

    def row_kind(self, sample: int, step: int) -> RowKind:
        """Return the kind of row number ``sample`` at ``step`` of the stage."""
        kind = self.rows[sample % len(self.rows)]
        if step < self.real_until:
            return "real"
        return "coupled" if kind == "free" and step < self.free_from else kind

    def dmd_scale(self, step: int) -> float:
        """Return the share of the DMD weight at ``step``."""
        return min(1.0, max(0.0, (step + 1 - self.dmd_from) / self.dmd_ramp)) if step >= self.dmd_from else 0.0
