"""Drift of the identity of a character.

Letters: w time windows, d values of an identity (a face embedding, or colors and pitch in the toy world).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]


def identity_error(vectors: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """Return the root mean square difference of each vector ``(w, d)`` from the first frame's ``(d,)``.

    The result ``(w,)`` is in units of the vectors. 0 is the same character.
    """
    if vectors.ndim != 2 or vectors.shape[1:] != reference.shape:
        raise ValueError(f"identity needs vectors (w, d) and a reference (d,); got {vectors.shape}, {reference.shape}")
    return np.sqrt(np.square(vectors.astype(np.float64) - reference).mean(1))


def identity_similarity(vectors: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """Return the cosine of each window's vector with the first frame's, -1 to 1, for directional embeddings."""
    if vectors.ndim != 2 or vectors.shape[1:] != reference.shape:
        raise ValueError(f"identity needs vectors (w, d) and a reference (d,); got {vectors.shape}, {reference.shape}")
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference)
    return (vectors.astype(np.float64) @ reference) / np.maximum(norms, 1e-12)
