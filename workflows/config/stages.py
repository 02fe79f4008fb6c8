"""Stages: the networks they train, their parent stages and the loss that measures progress."""

from collections.abc import Mapping
from dataclasses import dataclass

from mfcore.types import AUDIO, VIDEO
from workflows.config.stage_names import Stage


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Properties of one stage."""

    modalities: tuple[str, ...]
    parents: tuple[Stage, ...]  # it starts from runs of all of these stages, or of none if optional
    parents_needed: bool
    trained: tuple[str, ...]  # networks with an optimizer
    headline: str  # loss term that measures progress on held-out clips


STAGES: dict[Stage, StageSpec] = {
    "video": StageSpec(
        modalities=(VIDEO,), parents=(), parents_needed=False, trained=("student",), headline="flow_matching"
    ),
    "audio": StageSpec(
        modalities=(AUDIO,), parents=(), parents_needed=False, trained=("student",), headline="flow_matching"
    ),
    "joint": StageSpec(
        modalities=(VIDEO, AUDIO),
        parents=("video", "audio"),
        parents_needed=True,
        trained=("student",),
        headline="flow_matching",
    ),
    "mutual": StageSpec(
        modalities=(VIDEO, AUDIO),
        parents=("joint",),
        parents_needed=True,
        trained=("student", "fake"),
        headline="shortcut",
    ),
}


def headline_loss(spec: StageSpec, terms: Mapping[str, float]) -> float:
    """Return the headline loss term, summed over the modalities."""
    return sum(value for key, value in terms.items() if key.split("/")[0] == spec.headline)
