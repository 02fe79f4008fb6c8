"""Objectives of the stages, and the values of their schedules."""

from dataclasses import replace
from typing import Any

from mfcore.ema import ema_decay
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.losses import Objective
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import learning_rate
from workflows.config.run import RunConfig

NEVER = 10**9  # step that no run reaches; the largest that settings accept


def build_objective(config: RunConfig) -> Objective:
    """Return the training objective of a run."""
    if isinstance(config.objective, MutualConfig):
        return MutualForcingObjective(config.objective)
    return FlowMatchingObjective(config.objective)


def validation_objective(config: RunConfig) -> Objective:
    """Return the objective of held-out evaluations, on the same inputs throughout a run.

    In the mutual stage: flow matching and ShortCut on real history, without rollouts and fake score.
    """
    if not isinstance(config.objective, MutualConfig):
        return FlowMatchingObjective(config.objective)
    rows = ("real",) * len(config.objective.rows)
    real_only = replace(config.objective, rows=rows, fake_from=NEVER, dmd_from=NEVER)
    return MutualForcingObjective(real_only)


def schedule_values(config: RunConfig, step: int) -> dict[str, Any]:
    """Return the values of the stage's schedules at ``step``, as information in a checkpoint."""
    optims = {"student": config.optim, **({"fake": config.fake_optim} if config.fake_optim else {})}
    facts: dict[str, Any] = {"lr": {name: learning_rate(o, step, config.steps) for name, o in optims.items()}}
    facts["ema_decay"] = ema_decay(config.ema, step)
    if isinstance(mutual := config.objective, MutualConfig):
        kinds = [mutual.row_kind(row, step) for row in range(len(mutual.rows))]
        facts["history"] = {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}  # share of the rows
        facts["strengths"] = [2.0**-k for k in mutual.strengths]  # of coupled history, drawn per step
        facts["dmd_weight"] = mutual.dmd_weight * mutual.dmd_scale(step)
    return {"schedule": {"stage_step": step, **facts}}


def max_few_steps(objective: FlowMatchingConfig | MutualConfig) -> int | None:
    """Return the most steps that the few-step mode is trained for; None outside the mutual stage.

    That is the number of intervals of the finest ShortCut level, without ShortCut of the longest rollout.
    """
    if not isinstance(objective, MutualConfig):
        return None
    return 2**objective.finest if objective.shortcut_weight else max(objective.rollout_steps)
