from dataclasses import replace
from typing import Any

from mfcore.ema import ema_decay
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.losses import Objective
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import learning_rate
from workflows.config.run import RunConfig

NEVER = 1 << 40  # step that no run reaches


def build_objective(config: RunConfig) -> Objective:
    if isinstance(config.objective, MutualConfig):
        return MutualForcingObjective(config.objective)
    return FlowMatchingObjective(config.objective)


def validation_objective(config: RunConfig) -> Objective:
    """The terms an evaluation reports. Mutual: flow matching and ShortCut on real history, at levels fixed by
    the sample numbers; no roll-outs, no fake score: both ends of a run are judged on the same inputs."""
    if not isinstance(config.objective, MutualConfig):
        return FlowMatchingObjective(config.objective)
    rows = ("real",) * len(config.objective.rows)
    judged = replace(config.objective, rows=rows, fake_from=NEVER, dmd_from=NEVER)
    return MutualForcingObjective(judged)


def schedule_values(config: RunConfig, step: int) -> dict[str, Any]:
    """Where the stage's schedules stand at ``step``: pure functions of it, so this is for readers of a checkpoint."""
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
    """Intervals of ShortCut's finest rung, without it those of the longest roll-out: shorter ones nobody trains."""
    if not isinstance(objective, MutualConfig):
        return None
    return 2**objective.finest if objective.shortcut_weight else max(objective.rollout_steps)
