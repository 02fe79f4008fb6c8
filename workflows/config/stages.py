"""What each stage trains, from what, and how it is judged. Only this file and the presets know stages by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from mfcore.types import AUDIO, VIDEO
from workflows.config.stage_names import Stage


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row of METHOD 5."""

    modalities: tuple[str, ...]
    parents: tuple[Stage, ...]  # stages it may start from; all of them, or none when they are optional
    parents_needed: bool
    trained: tuple[str, ...]  # networks with an optimizer
    headline: str  # the term whose held-out value tells whether the stage learns


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


def headline_loss(plan: StageSpec, terms: Mapping[str, float]) -> float:
    """The headline term, summed over the modalities."""
    return sum(value for key, value in terms.items() if key.split("/")[0] == plan.headline)
