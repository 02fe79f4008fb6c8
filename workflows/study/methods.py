"""Methods of the study: Mutual Forcing, its baselines, and ablations with one change each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from mfcore.model.lora import FakeScoreConfig
from mfcore.objectives import baselines
from mfcore.objectives.losses import Objective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.solver import Mode
from workflows.study.config import StudyConfig

ABLATION_COUNTS = (4, 8)  # step counts with claims; 50 steps cost as much as all others together


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train from the joint network, or from the network of another method."""

    key: str  # letter in the table
    title: str
    objective: Callable[[MutualConfig], Objective]
    modes: tuple[Mode, ...] = ("few",)  # sampling modes
    counts: tuple[int, ...] | None = None  # steps per chunk; None: all counts of the study
    start: str = "joint"  # network before the first step: "joint", or a method
    teacher: Literal["average", "frozen"] = "average"  # frozen: copy of the joint network, as in Self-Forcing
    change: Callable[[StudyConfig], StudyConfig] = lambda config: config  # changed settings


def _changed(config: StudyConfig, **method: Any) -> StudyConfig:
    return replace(config, method=replace(config.method, **method))


def _ablation(number: int, title: str, change: Callable[[StudyConfig], StudyConfig]) -> Method:
    return Method(
        key=f"h{number}", title=title, objective=baselines.mutual_forcing, counts=ABLATION_COUNTS, change=change
    )


def _at_once(config: StudyConfig) -> StudyConfig:
    return _changed(config, real_until=0, free_from=0, fake_from=0, dmd_from=0)


def _less_free(config: StudyConfig) -> StudyConfig:
    """Halve the free rows; the shares of rows with the finest level are unchanged."""
    cycle = [("real", True), ("free", False), ("coupled", False), ("real", True)]
    cycle += [("coupled", False), ("free", True), ("real", True), ("coupled", False)]
    return _changed(config, rows=tuple(kind for kind, _ in cycle), finest_rows=tuple(finest for _, finest in cycle))


def _independent_levels(config: StudyConfig) -> StudyConfig:
    return _changed(config, time=replace(config.method.time, independent=True))


def _gentler(config: StudyConfig) -> StudyConfig:
    """Lower the rate: DMD without ShortCut diverges at the full rate."""
    return replace(config, optim=replace(config.optim, lr=config.optim.lr * 2 / 3))


def _without_data(config: StudyConfig) -> StudyConfig:
    """Speed up the fake score: without data losses the student diverges if it lags."""
    return replace(_gentler(config), fake_ratio=4.0)


def _as_published(config: StudyConfig) -> StudyConfig:
    """Update the fake score five times per step, as in Self-Forcing."""
    return _changed(_gentler(config), fake_updates=5)


BASELINES: dict[str, Method] = {
    "teacher_forcing": Method(key="a", title="teacher forcing", objective=baselines.teacher_forcing, modes=("multi",)),
    "shortcut_forced": Method(key="b", title="ShortCut, real history", objective=baselines.shortcut_forced),
    "dmd_forced": Method(key="c", title="DMD, real history", objective=baselines.dmd_forced, change=_gentler),
    "dmd_self_forcing": Method(
        key="d",
        title="DMD, self-forcing, frozen teacher",
        objective=baselines.dmd_self_forcing,
        teacher="frozen",
        change=_without_data,
    ),
    "self_forcing": Method(
        key="d2",
        title="Self-Forcing from row b, five fake-score updates",
        objective=baselines.dmd_self_forcing,
        start="shortcut_forced",
        teacher="frozen",
        change=_as_published,
    ),
    "hybrid_forced": Method(key="e", title="ShortCut and DMD, real history", objective=baselines.hybrid_forced),
    "shortcut_only": Method(key="f1", title="the loop with ShortCut only", objective=baselines.shortcut_only),
    "dmd_only": Method(key="f2", title="the loop with DMD only", objective=baselines.dmd_only),
    "literal": Method(key="g", title="literal reading, s = 1", objective=baselines.literal_mutual_forcing),
    "mutual": Method(key="h", title="Mutual Forcing", objective=baselines.mutual_forcing, modes=("few", "multi")),
}

ABLATIONS: dict[str, Method] = {
    name: _ablation(number, title, change)
    for number, (name, title, change) in enumerate(
        [
            ("no_label", "no trust label", partial(_changed, trust_label=False)),
            ("weak_history", "coupled history at s = 1/8 only", partial(_changed, strengths=(3,))),
            ("strong_history", "coupled history at s = 1/2 only", partial(_changed, strengths=(1,))),
            ("jump_exit", "roll-outs left by a jump", partial(_changed, jump_exit=True)),
            ("at_once", "everything from the first step", _at_once),
            ("shallow", "ShortCut ladder of depth 2", partial(_changed, finest=2, strengths=(2,), rollout_steps=(4,))),
            ("one_midpoint", "one midpoint interval at the finest rung", partial(_changed, base="midpoint")),
            ("euler_base", "Euler halves instead of midpoints", partial(_changed, base="euler")),
            ("online_targets", "targets from the student itself", partial(_changed, online_targets=True)),
            ("unguided", "no guidance in the targets", partial(_changed, guidance=1.0)),
            ("guided_more", "guidance 1.5 in the targets", partial(_changed, guidance=1.5)),
            ("less_dmd", "DMD weighed half as much as ShortCut", partial(_changed, dmd_weight=1.0)),
            ("more_dmd", "DMD weighed twice as much as ShortCut", partial(_changed, dmd_weight=4.0)),
            ("fast_fake", "fake score at four times the student's rate", lambda c: replace(c, fake_ratio=4.0)),
            ("steady_fake", "fake score at a constant rate", lambda c: replace(c, fake_final=1.0)),
            ("low_rank", "fake score of rank 4", lambda c: replace(c, fake=FakeScoreConfig(rank=4))),
            ("independent_levels", "a noise level per modality", _independent_levels),
            ("less_free", "a quarter of free rows", _less_free),
            ("longer_clips", "clips of 6 or 10 chunks", lambda c: replace(c, chunks=(6, 10))),
            ("deep_rungs", "coarse rungs near the finest more often", partial(_changed, depth_power=0.5)),
        ],
        start=1,
    )
}  # fmt: skip

METHODS: dict[str, Method] = BASELINES | ABLATIONS
"""Methods by the name in ``--methods``."""

GROUPS: dict[str, tuple[str, ...]] = {
    "core": ("teacher_forcing", "dmd_self_forcing", "hybrid_forced", "literal", "mutual"),  # run with all seeds
    "all": tuple(BASELINES),
    "ablations": ("mutual", *ABLATIONS),
    "quick": ("teacher_forcing", "literal", "mutual"),
}
