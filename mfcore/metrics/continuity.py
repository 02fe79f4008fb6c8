"""Do chunks join? Drift metrics reward forgetting the past; these see it.

Letters: n steps in time, c clips, d coordinates.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.number[Any]]


def seam_energy(values: Values, chunk: NDArray[np.integer[Any]]) -> float:
    """Mean squared change across chunk borders / mean squared change inside chunks; 1 for a seamless clip.

    ``values (n, ...)`` may be pixel frames, latents or an envelope of sound; ``chunk (n,)`` is the chunk of each. A
    still clip gives 1, jumps of an otherwise still one infinity. ValueError where there is no border or no inside.
    """
    if len(values) != len(chunk):
        raise ValueError(f"{len(values)} values but {len(chunk)} chunk numbers: give one per step")
    change = step_energy(values)
    border = np.diff(chunk) != 0
    if not border.any() or border.all():
        raise ValueError("seam energy compares changes at and inside chunks: give two chunks of two or more steps")
    across, inside = float(change[border].mean()), float(change[~border].mean())
    if inside == 0:
        return 1.0 if across == 0 else float("inf")
    return across / inside


def step_energy(values: Values) -> NDArray[np.float64]:
    """Mean squared change from each step to the next, ``(n - 1,)``, in squared units of ``values (n, ...)``."""
    rows = values.reshape(len(values), -1)
    # Pair by pair: the float copy of a whole clip of frames would be eight times its size.
    return np.array([np.square(b.astype(np.float64) - a.astype(np.float64)).mean() for a, b in pairwise(rows)])


def lag_one_correlation(states: NDArray[np.floating[Any]]) -> float:
    """Pearson correlation of a slow state with its next value, pooled over the clips of ``states (c, n)``.

    1 for a state that stays, 0 for one drawn anew each time; nan where it never varies. One mean and one spread for
    all clips, so a state that differs between clips but not within counts as persistent.
    """
    if states.ndim != 2 or states.shape[1] < 2:
        raise ValueError(f"states of shape {states.shape}: give (clips, steps) with two or more steps")
    return pooled_lag_one_correlation([clip[:, None] for clip in states])


def pooled_lag_one_correlation(clips: Sequence[NDArray[np.floating[Any]]]) -> float:
    """The same of clips ``(n, d)`` that may differ in length, pooled over their coordinates, each about its own mean;
    nan without a clip of two steps."""
    pairs = [(states[:-1], states[1:]) for states in clips if len(states) > 1]
    if not pairs:
        return float("nan")
    now, after = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    now, after = now - now.mean(0), after - after.mean(0)
    norm = float(np.sqrt(np.square(now).sum() * np.square(after).sum()))
    return float((now * after).sum()) / norm if norm > 0 else float("nan")
