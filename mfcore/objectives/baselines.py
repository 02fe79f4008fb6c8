"""What Mutual Forcing is compared with (METHOD 7): each a setting of the same pieces, none a copy of them.

Every function takes the settings of the full method and gives the objective of its baseline. Those that need a network
of their own as teacher name "ema" in ``needs`` like all others: whoever trains them hands a frozen copy in.
"""

from dataclasses import replace

from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig, RowKind


def teacher_forcing(config: MutualConfig) -> FlowMatchingObjective:
    """Flow matching on real history, and nothing else."""
    return FlowMatchingObjective(FlowMatchingConfig(time=config.time))


def shortcut_forced(config: MutualConfig) -> MutualForcingObjective:
    """Flow matching and ShortCut, both on real history."""
    return MutualForcingObjective(replace(_rows(config, "real"), dmd_weight=0.0))


def dmd_forced(config: MutualConfig) -> MutualForcingObjective:
    """Flow matching on real history; DMD on single chunks made after real history."""
    return MutualForcingObjective(_dmd_at_once(_rows(config, "forced")))


def dmd_self_forcing(config: MutualConfig) -> MutualForcingObjective:
    """DMD alone on the model's own roll-outs, as Self-Forcing does it; its teacher is a frozen copy."""
    return MutualForcingObjective(_dmd_at_once(_rows(config, "free")))


def hybrid_forced(config: MutualConfig) -> MutualForcingObjective:
    """All three terms of the full method, with the loop cut: every history is real."""
    return MutualForcingObjective(_rows(config, "forced"))


def shortcut_only(config: MutualConfig) -> MutualForcingObjective:
    """The full method without DMD."""
    return MutualForcingObjective(replace(config, dmd_weight=0.0))


def dmd_only(config: MutualConfig) -> MutualForcingObjective:
    """The full method without ShortCut."""
    return MutualForcingObjective(replace(config, shortcut_weight=0.0))


def literal_mutual_forcing(config: MutualConfig) -> MutualForcingObjective:
    """The literal reading: flow matching regresses real chunks on histories that were rolled out from noise."""
    rows: list[RowKind] = ["free" if kind == "free" else "literal" for kind in config.rows]
    return MutualForcingObjective(replace(config, rows=tuple(rows)))


def mutual_forcing(config: MutualConfig) -> MutualForcingObjective:
    """The full method: coupled and free history."""
    return MutualForcingObjective(config)


def _rows(config: MutualConfig, kind: RowKind) -> MutualConfig:
    return replace(config, rows=(kind,) * len(config.rows))


def _dmd_at_once(config: MutualConfig) -> MutualConfig:
    """DMD in place of ShortCut, as soon as the fake score has had its steps alone, and at the weight of flow matching:
    at twice that it is worse on real history (lab log).
    """
    early = config.dmd_from - config.fake_from
    return replace(config, shortcut_weight=0.0, dmd_weight=1.0, real_until=0, free_from=0, fake_from=0, dmd_from=early)
