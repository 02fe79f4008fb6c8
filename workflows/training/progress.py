from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int  # optimizer steps done
    samples_seen: int
    first: dict[str, float]  # held-out terms before the first step
    last: dict[str, float]  # held-out terms at the latest evaluation
    skipped: int = 0  # steps left out because a loss or gradient was not finite
