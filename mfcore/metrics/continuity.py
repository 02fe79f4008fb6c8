"""Continuity between chunks; drift metrics cannot detect that history is ignored.

Letters: n steps in time, c clips, d coordinates.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.number[Any]]


def seam_energy(values: Values, chunk: NDArray[np.integer[Any]]) -> float:
    """Return mean squared change across chunk borders / inside chunks; 1 for a seamless clip.

    ``values (n, ...)`` are pixel frames, latents or an audio envelope; ``chunk (n,)`` is the chunk number of each. A
    static clip gives 1, and infinity if it changes at borders only. Raises ValueError without a border or an inside.
    """
    if len(values) != len(chunk):
        raise ValueError(f"{len(values)} values but {len(chunk)} chunk numbers: give one per step")
    change = step_energy(values)
    border = np.diff(chunk) != 0
    if not border.any() or border.all():
        raise ValueError(
            "seam energy compares changes at and inside chunks: give two or more chunks of two or more steps"
        )
    across, inside = float(change[border].mean()), float(change[~border].mean())
    if inside == 0:
        return 1.0 if across == 0 else float("inf")
    return across / inside


def step_energy(values: Values) -> NDArray[np.float64]:
    """Return the mean squared change per step ``(n - 1,)``, in squared units of ``values (n, ...)``."""
    rows = values.reshape(len(values), -1)
    # Pair by pair: a float copy of all frames would take eight times their memory.
    return np.array([np.square(b.astype(np.float64) - a.astype(np.float64)).mean() for a, b in pairwise(rows)])


def lag_one_correlation(states: NDArray[np.floating[Any]]) -> float:
    """Return the Pearson correlation of a state with its next value, pooled over ``states (c, n)``.

    1 for a constant state, 0 for an independent draw per step, nan without variation. All clips share one mean and one
    spread, so a state that differs between clips only counts as persistent.
    """
    if states.ndim != 2 or states.shape[1] < 2:
        raise ValueError(f"states of shape {states.shape}: give (clips, steps) with two or more steps")
    return pooled_lag_one_correlation([clip[:, None] for clip in states])


def pooled_lag_one_correlation(clips: Sequence[NDArray[np.floating[Any]]]) -> float:
    """Return the lag-one correlation of clips ``(n, d)`` of any length, pooled over coordinates.

    Each coordinate is centered separately. nan without a clip of two steps.
    """
    pairs = [(states[:-1], states[1:]) for states in clips if len(states) > 1]
    if not pairs:
        return float("nan")
    now, after = (np.concatenate(values).astype(np.float64) for values in zip(*pairs, strict=True))
    now, after = now - now.mean(0), after - after.mean(0)
    norm = float(np.sqrt(np.square(now).sum() * np.square(after).sum()))
    return float((now * after).sum()) / norm if norm > 0 else float("nan")
