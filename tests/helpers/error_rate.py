"""Error rate of recognized words."""

from collections.abc import Hashable, Sequence

from mfcore.metrics.speech import edit_distance


def error_rate(heard: Sequence[Sequence[Hashable]], reference: Sequence[Sequence[Hashable]]) -> float:
    """Return the sum of edit distances over the number of reference units of all clips."""
    edits = sum(edit_distance(a, b) for a, b in zip(heard, reference, strict=True))
    return edits / sum(map(len, reference))
