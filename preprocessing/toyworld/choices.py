"""What the readers of the toy world share: nearest mode with validity.

Letters: K observations (half seconds), M modes, P numbers of one observation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_RESIDUAL = 0.34
"""Largest distance to the nearest mode, in units of that mode's distance to its neighbour. A half-and-half mixture of
two modes lies at 0.5 or more from both in pixels; 640 half seconds of the world, reconstructed from latents, stay below
0.22 in all that is seen, and below 0.32 in tone."""


@dataclass(frozen=True, kw_only=True)
class ChoiceReading:
    """One free choice, per half second."""

    mode: NDArray[np.int64]  # [K] nearest mode
    valid: NDArray[np.bool_]  # [K] it is close to that mode
    residual: Array  # [K] distance to the mode / distance of that mode to its neighbour
    present: NDArray[np.bool_]  # [K] False where there was nothing to read (no speech: no tone); never valid there


def nearest_mode(observed: Array, modes: Array) -> tuple[NDArray[np.int64], Array]:
    """Nearest of ``modes [M, P]`` to each of ``observed [K, P]``, and the residual as in ``ChoiceReading``.

    Distances are taken within the span of the modes' differences: blur, noise and whatever else all modes share do
    not count. What lies near no mode (a flat patch, noise) falls near the middle of the modes, far from each.
    """
    middle = modes.mean(0)
    _, strength, basis = np.linalg.svd(modes - middle, full_matrices=False)
    basis = basis[strength > 1e-3 * strength[0]]
    at, centres = (observed - middle) @ basis.T, (modes - middle) @ basis.T
    distance = np.linalg.norm(at[:, None] - centres, axis=-1)
    apart = np.linalg.norm(centres[:, None] - centres, axis=-1)
    np.fill_diagonal(apart, np.inf)
    mode = distance.argmin(1)
    return mode, distance.min(1) / apart.min(1)[mode]


def make_reading(mode: NDArray[np.int64], residual: Array, present: NDArray[np.bool_] | None = None) -> ChoiceReading:
    present = np.ones(len(mode), bool) if present is None else present
    return ChoiceReading(mode=mode, residual=residual, present=present, valid=(residual < MAX_RESIDUAL) & present)


def valid_fraction(choices: Mapping[str, ChoiceReading]) -> float:
    """Share of half seconds in which every choice that can be read is valid; nan when there is none."""
    bad = np.any([~c.valid & c.present for c in choices.values()], axis=0)
    seen = np.any([c.present for c in choices.values()], axis=0)
    return float(1 - bad[seen].mean()) if seen.any() else float("nan")
