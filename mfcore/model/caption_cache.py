"""What a stream keeps of its caption from chunk to chunk, while neither caption nor weights change.

Asking a GPU whether two captions are equal would make the CPU wait, so it is the same *tensors* that are asked for, and
torch's counts of what was written into them: another caption with equal numbers is computed again, which is slow and
not wrong. Torch does not count what is written through ``tensor.data`` or a numpy array of the same numbers, and counts
nothing for tensors made in ``torch.inference_mode``: of the latter nothing is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.model.kv_cache import KeyValue


@dataclass(frozen=True)
class TensorVersions:
    """What something was computed from, as it was then, and the precision of products in it."""

    parts: tuple[Tensor, ...]
    places: tuple[tuple[int, torch.dtype], ...]  # of their numbers: ``Module.to`` gives a tensor others
    versions: tuple[int, ...] | None  # None: not counted
    autocast: torch.dtype | None

    def is_current(self, now: "TensorVersions") -> bool:
        """Whether the same computation gives the same again."""
        counted = self.versions is not None and self.versions == now.versions and self.autocast == now.autocast
        same = self.places == now.places and all(a is b for a, b in zip(self.parts, now.parts, strict=True))
        return counted and same


def tensor_versions(parts: Iterable[Tensor]) -> TensorVersions:
    """Of what is computed from ``parts`` now."""
    kept = tuple(parts)
    kind = kept[0].device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return TensorVersions(
        parts=kept,
        places=tuple((part.data_ptr(), part.dtype) for part in kept),
        versions=None if any(part.is_inference() for part in kept) else tuple(part._version for part in kept),
        autocast=torch.get_autocast_dtype(kind) if autocast else None,
    )


@dataclass(frozen=True, kw_only=True)
class CachedCaption:
    """A caption in one branch: its embedded tokens, and their keys and values in every layer."""

    tokens: Float[Tensor, "B 1+L d"]
    layers: list[KeyValue]
    origin: TensorVersions
