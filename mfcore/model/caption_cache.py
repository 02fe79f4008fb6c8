"""Cache of the caption keys and values of a stream, valid while caption and weights are unchanged.

Comparing values on a GPU would synchronize. The check therefore compares the identity and the version counter of the
tensors. An equal caption in other tensors misses the cache: correct, but slower. Writes through ``tensor.data`` or a
shared numpy array are not counted. Tensors created in ``torch.inference_mode`` have no counter and are never cached.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.model.kv_cache import KeyValue


@dataclass(frozen=True)
class TensorVersions:
    """Identity and version of the tensors of a computation, and its autocast dtype."""

    tensors: tuple[Tensor, ...]
    storage: tuple[tuple[int, torch.dtype], ...]  # address and dtype of the data, which ``Module.to`` replaces
    versions: tuple[int, ...] | None  # None: no version counter
    autocast: torch.dtype | None

    def is_current(self, other: "TensorVersions") -> bool:
        """Return True if the computation with ``other`` gives the same result."""
        counted = self.versions is not None and self.versions == other.versions and self.autocast == other.autocast
        same = self.storage == other.storage and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        return counted and same


def tensor_versions(tensors: Iterable[Tensor]) -> TensorVersions:
    """Return the current versions of ``tensors``."""
    tensors = tuple(tensors)
    kind = tensors[0].device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return TensorVersions(
        tensors=tensors,
        storage=tuple((part.data_ptr(), part.dtype) for part in tensors),
        versions=None if any(part.is_inference() for part in tensors) else tuple(part._version for part in tensors),
        autocast=torch.get_autocast_dtype(kind) if autocast else None,
    )


@dataclass(frozen=True, kw_only=True)
class CachedCaption:
    """Caption in one branch: embedded tokens, and keys and values of every layer."""

    tokens: Float[Tensor, "B p+L d"]
    layers: list[KeyValue]
    versions: TensorVersions
