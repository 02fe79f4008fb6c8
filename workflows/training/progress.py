"""Progress of a run, as stored in checkpoints and outcomes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Position of a run and its held-out losses."""

    step: int  # optimizer steps done
    samples_seen: int
    first: dict[str, float]  # held-out terms before the first step
    last: dict[str, float]  # held-out terms at the latest evaluation
    skipped: int = 0  # steps skipped because a loss or gradient was not finite
