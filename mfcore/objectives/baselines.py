"""Baselines of Mutual Forcing (METHOD 7): other settings of the same parts.

Each function takes the configuration of the full method and returns the objective of its baseline. A baseline with a
frozen teacher also requires "ema" in ``needs``; the trainer passes the frozen copy under that name.
"""

from dataclasses import replace

from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig, RowKind


def teacher_forcing(config: MutualConfig) -> FlowMatchingObjective:
    """Return flow matching on real history."""
    return FlowMatchingObjective(FlowMatchingConfig(time=config.time))


def shortcut_forced(config: MutualConfig) -> MutualForcingObjective:
    """Return flow matching and ShortCut, both on real history."""
    return MutualForcingObjective(replace(_with_rows(config, "real"), dmd_weight=0.0))


def dmd_forced(config: MutualConfig) -> MutualForcingObjective:
    """Return flow matching on real history with DMD on single chunks after real history."""
    return MutualForcingObjective(_start_dmd_early(_with_rows(config, "forced")))


def dmd_self_forcing(config: MutualConfig) -> MutualForcingObjective:
    """Return DMD alone on rollouts of the model, as in Self-Forcing; the teacher is a frozen copy."""
    return MutualForcingObjective(_start_dmd_early(_with_rows(config, "free")))


def hybrid_forced(config: MutualConfig) -> MutualForcingObjective:
    """Return all three losses of the full method on real history only."""
    return MutualForcingObjective(_with_rows(config, "forced"))


def shortcut_only(config: MutualConfig) -> MutualForcingObjective:
    """Return the full method without DMD."""
    return MutualForcingObjective(replace(config, dmd_weight=0.0))


def dmd_only(config: MutualConfig) -> MutualForcingObjective:
    """Return the full method without ShortCut."""
    return MutualForcingObjective(replace(config, shortcut_weight=0.0))


def literal_mutual_forcing(config: MutualConfig) -> MutualForcingObjective:
    """Return the literal reading: flow matching of real chunks on history rolled out from noise."""
    rows: list[RowKind] = ["free" if kind == "free" else "literal" for kind in config.rows]
    return MutualForcingObjective(replace(config, rows=tuple(rows)))


def mutual_forcing(config: MutualConfig) -> MutualForcingObjective:
    """Return the full method: coupled and free history."""
    return MutualForcingObjective(config)


def _with_rows(config: MutualConfig, kind: RowKind) -> MutualConfig:
    return replace(config, rows=(kind,) * len(config.rows))


def _start_dmd_early(config: MutualConfig) -> MutualConfig:
    """Replace ShortCut by DMD, which starts after the steps of the fake score alone, at the weight of flow matching.

    Twice that weight is worse on real history (lab log).
    """
    early = config.dmd_from - config.fake_from
    return replace(config, shortcut_weight=0.0, dmd_weight=1.0, real_until=0, free_from=0, fake_from=0, dmd_from=early)
