"""Find evaluation clips in training sets, by clip id, source name and source content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from preprocessing.dataset.reader import open_dataset
from preprocessing.dataset.units import read_units
from preprocessing.io.storage import Store
from workflows.evaluation.held_out import EvaluationSet


class OverlapSummary(TypedDict, total=False):
    """JSON form of an overlap: either ``unknown``, or ``clips`` and ``sources``."""

    unknown: str
    clips: list[str]
    sources: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainTestOverlap:
    """Prompts of a sweep that are in the training set of a checkpoint."""

    clips: tuple[str, ...]  # ids of prompts
    sources: Mapping[str, str]  # source URI of a prompt -> fingerprint of the content
    unknown: str | None = None  # the reason if the overlap is unknown

    @property
    def summary(self) -> OverlapSummary:
        """Return the JSON form."""
        if self.unknown is not None:
            return {"unknown": self.unknown}
        return {"clips": list(self.clips), "sources": dict(self.sources)}


def find_train_test_overlap(
    evaluation_set: EvaluationSet, uri: str, trained_on: str | None, held_out: float
) -> TrainTestOverlap:
    """Return the prompts that are in the training set of a checkpoint.

    Args:
        evaluation_set: Prompts of the sweep.
        uri: Dataset of the prompts.
        trained_on: Dataset of the training; None if it is unknown.
        held_out: Share of the sources of ``trained_on`` that training did not use.
    """
    if trained_on is None:
        return TrainTestOverlap(clips=(), sources={}, unknown="the checkpoint does not record its dataset")
    try:
        training, _ = open_dataset(trained_on).split(held_out)
        contents = _contents(trained_on)
        own_contents = contents if trained_on == uri else _contents(uri)
    except (ValueError, OSError) as error:
        return TrainTestOverlap(clips=(), sources={}, unknown=f"its training set cannot be read: {error}")
    ids, names = set(training.ids), training.sources
    known_contents = {contents.get(name, name) for name in names}
    clips = [p.clip for p in evaluation_set.prompts]
    shared = [
        c for c in clips if c.id in ids or c.source_uri in names or own_contents.get(c.source_uri) in known_contents
    ]
    return TrainTestOverlap(
        clips=tuple(c.id for c in shared),
        sources={c.source_uri: own_contents.get(c.source_uri, "unknown") for c in shared},
    )


def _contents(uri: str) -> dict[str, str]:
    """Return the content fingerprint of every source of a dataset, by URI."""
    return {s.uri: s.fingerprint for unit in read_units(Store(uri)) for s in unit.sources}


def overlap_warnings(overlaps: Mapping[str, TrainTestOverlap]) -> Sequence[str]:
    """Return a warning for each checkpoint (by label) with a known or possible overlap."""
    lines: list[str] = []
    for label, overlap in overlaps.items():
        if overlap.clips:
            names = ", ".join(overlap.clips[:3]) + (" ..." if len(overlap.clips) > 3 else "")
            trained = f"{label} was trained on {len(overlap.clips)} of these clips: {names}"
            lines.append(f"{trained}. Its scores are not a held-out evaluation")
        elif overlap.unknown is not None:
            lines.append(f"{label}: overlap with its training set is unknown: {overlap.unknown}")
    return lines
