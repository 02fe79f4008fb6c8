"""The rows of the table: the method and its baselines (METHOD 7)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mfcore.objectives import baselines
from mfcore.objectives.recipe import MutualConfig
from mfcore.objectives.terms import Objective
from mfcore.steps import Mode


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train on from the joint network."""

    key: str  # letter in the table
    title: str
    objective: Callable[[MutualConfig], Objective]
    modes: tuple[Mode, ...] = ("few",)  # how it is asked
    teacher: Literal["average", "frozen"] = "average"  # frozen: a copy of the joint network, as Self-Forcing has it


METHODS: dict[str, Method] = {
    "teacher_forcing": Method(key="a", title="teacher forcing", objective=baselines.teacher_forcing, modes=("multi",)),
    "shortcut_forced": Method(key="b", title="ShortCut, real history", objective=baselines.shortcut_forced),
    "dmd_forced": Method(key="c", title="DMD, real history", objective=baselines.dmd_forced),
    "dmd_self_forcing": Method(
        key="d", title="DMD, self-forcing, frozen teacher", objective=baselines.dmd_self_forcing, teacher="frozen"
    ),
    "hybrid_forced": Method(key="e", title="ShortCut and DMD, real history", objective=baselines.hybrid_forced),
    "shortcut_only": Method(key="f1", title="the loop with ShortCut only", objective=baselines.shortcut_only),
    "dmd_only": Method(key="f2", title="the loop with DMD only", objective=baselines.dmd_only),
    "literal": Method(key="g", title="literal reading, s = 1", objective=baselines.literal),
    "mutual": Method(key="h", title="Mutual Forcing", objective=baselines.mutual_forcing, modes=("few", "multi")),
}
