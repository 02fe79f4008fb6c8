"""Does a character stay who it is?

Letters: w time windows, d numbers that describe an identity (a face embedding, or colours and pitch in the toy world).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]


def identity_error(vectors: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """Root mean square difference of each window's vector ``(w, d)`` from the first frame's ``(d,)``; ``(w,)``.

    In units of the vectors. 0 is the same character.
    """
    if vectors.ndim != 2 or vectors.shape[1:] != reference.shape:
        raise ValueError(f"identity needs vectors (w, d) and a reference (d,); got {vectors.shape}, {reference.shape}")
    return np.sqrt(np.square(vectors.astype(np.float64) - reference).mean(1))


def identity_similarity(vectors: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """Cosine of each window's vector with the first frame's, for embeddings whose length means nothing; -1 to 1."""
    if vectors.ndim != 2 or vectors.shape[1:] != reference.shape:
        raise ValueError(f"identity needs vectors (w, d) and a reference (d,); got {vectors.shape}, {reference.shape}")
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference)
    return (vectors.astype(np.float64) @ reference) / np.maximum(norms, 1e-12)
