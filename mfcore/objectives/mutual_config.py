"""What a mutual step is made of, and in which order its parts come in."""

from dataclasses import dataclass
from typing import Literal

from mfcore.flow import TimeConfig
from mfcore.objectives.shortcut import BaseRule

RowKind = Literal["real", "coupled", "free", "literal", "forced"]
"""What the history of a row is, and with it which terms the row has: see ``mutual.py``."""


@dataclass(frozen=True, kw_only=True)
class MutualConfig:
    """One mutual step, and the order in which its parts come in. All lengths are optimizer steps of the stage."""

    time: TimeConfig
    rows: tuple[RowKind, ...] = ("real", "free", "coupled", "free")  # by sample number, cyclic
    finest_rows: tuple[bool, ...] = (True, False, False, True)  # ShortCut at the deepest level, same cycle
    finest: int = 5  # depth of the ShortCut ladder: 2^finest intervals
    depth_power: float = 1.0  # below 1 coarser levels that are nearer to the finest are drawn more often
    strengths: tuple[int, ...] = (3, 4, 5)  # coupled history at s = shift(2^-k), k drawn per step
    rollout_steps: tuple[int, ...] = (4, 8)  # few-step calls per chunk of free history, drawn per step
    guidance: float = 2.0  # built into the few-step mode
    shortcut_weight: float = 2 / 3
    dmd_weight: float = 1 / 3
    dmd_floor: float = 1e-3  # least normaliser of the DMD gradient
    trust_label: bool = True  # label history with its strength
    base: BaseRule = "midpoint"  # how ShortCut asks the multi-step mode at the deepest level
    online_targets: bool = False  # ablation: the student teaches itself, instead of its average
    jump_exit: bool = False  # ablation: leave the roll-out by one call instead of finishing the schedule
    fake_updates: int = 1  # of the fake score, for one of the student; all on the same roll-outs, at new noise levels
    share_history: bool = False  # the fake score reads the teacher's keys and values: sound for a low-rank one only
    real_until: int = 0  # ShortCut on real history only, before this step
    free_from: int = 0  # free history from this step on (before: such rows are coupled)
    fake_from: int = 0  # the fake score learns from this step on
    dmd_from: int = 0  # DMD moves the student from this step on
    dmd_ramp: int = 1  # steps over which its weight rises

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.finest_rows):
            raise ValueError("rows and finest_rows describe the same cycle: give them equal lengths")
        if max(self.strengths) > self.finest:
            raise ValueError(f"history strengths {self.strengths} go beyond the ShortCut depth {self.finest}")
        if any(s & (s - 1) or s > 2**self.finest for s in self.rollout_steps):
            raise ValueError(
                f"rollout_steps {self.rollout_steps}: ShortCut trains powers of two up to {2**self.finest} steps"
            )
        if not self.depth_power > 0:
            raise ValueError(f"depth_power {self.depth_power}: choose 1 (coarse levels alike) or less, but above 0")
        if "forced" in self.rows and {"free", "literal"} & set(self.rows):
            raise ValueError(f"rows {self.rows}: forced ones cut the loop that free and literal ones close, choose one")
        if self.fake_updates < 1:
            raise ValueError(f"fake_updates {self.fake_updates}: the fake score needs at least one update per step")
        if self.dmd_from < self.fake_from:
            raise ValueError("DMD needs a fake score that has learned: dmd_from must not come before fake_from")

    def row_kind(self, sample: int, step: int) -> RowKind:
        """What row number ``sample`` is at this step of the stage."""
        kind = self.rows[sample % len(self.rows)]
        if step < self.real_until:
            return "real"
        return "coupled" if kind == "free" and step < self.free_from else kind

    def dmd_scale(self, step: int) -> float:
        """Share of the DMD weight that is in force."""
        return min(1.0, max(0.0, (step + 1 - self.dmd_from) / self.dmd_ramp)) if step >= self.dmd_from else 0.0
