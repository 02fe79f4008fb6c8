"""Nearest mode of a free choice with its validity, for the readers of the toy world.

Letters: K observations (half seconds), M modes, P numbers of one observation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_RESIDUAL = 0.34
"""Largest valid distance to the nearest mode, in units of the distance of that mode to its neighbor.

An equal mixture of two modes is at 0.5 or more from both in pixels. In 640 half seconds reconstructed from latents, the
distance is below 0.22 for visual choices and below 0.32 for the tone.
"""


@dataclass(frozen=True, kw_only=True)
class ChoiceReading:
    """Reading of one free choice per half second."""

    mode: NDArray[np.int64]  # [K] nearest mode
    valid: NDArray[np.bool_]  # [K] close to that mode
    residual: Array  # [K] distance to the mode / distance of that mode to its neighbor
    present: NDArray[np.bool_]  # [K] False without a signal (no speech: no tone); then never valid


def nearest_mode(observed: Array, modes: Array) -> tuple[NDArray[np.int64], Array]:
    """Return the nearest of ``modes [M, P]`` to each of ``observed [K, P]``, and the residual.

    Distances are taken in the span of the differences of modes, so blur and noise common to all modes are ignored. A
    flat or noisy patch falls near the mean of the modes, far from each.
    """
    middle = modes.mean(0)
    _, strength, basis = np.linalg.svd(modes - middle, full_matrices=False)
    basis = basis[strength > 1e-3 * strength[0]]
    points, centers = (observed - middle) @ basis.T, (modes - middle) @ basis.T
    distance = np.linalg.norm(points[:, None] - centers, axis=-1)
    apart = np.linalg.norm(centers[:, None] - centers, axis=-1)
    np.fill_diagonal(apart, np.inf)
    mode = distance.argmin(1)
    return mode, distance.min(1) / apart.min(1)[mode]


def make_reading(mode: NDArray[np.int64], residual: Array, present: NDArray[np.bool_] | None = None) -> ChoiceReading:
    """Return a reading with validity by MAX_RESIDUAL; `present` defaults to all True."""
    present = np.ones(len(mode), bool) if present is None else present
    return ChoiceReading(mode=mode, residual=residual, present=present, valid=(residual < MAX_RESIDUAL) & present)


def valid_fraction(choices: Mapping[str, ChoiceReading]) -> float:
    """Return the share of valid half seconds among those with a signal; nan for none."""
    bad = np.any([~c.valid & c.present for c in choices.values()], axis=0)
    seen = np.any([c.present for c in choices.values()], axis=0)
    return float(1 - bad[seen].mean()) if seen.any() else float("nan")
