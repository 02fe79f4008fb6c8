"""Copies of small CPU tensors (positions, levels, random draws, row indices) to the device of the latents."""

import torch
from torch import Tensor


def to_device_of(tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``tensor`` on the device of ``like``, in its dtype unless ``dtype`` is given.

    A blocking copy would synchronize with the GPU. From pageable CPU memory it need not block: CUDA has read the source
    when the call returns. Copies to the CPU do block.
    """
    return tensor.to(like.device, dtype or tensor.dtype, non_blocking=tensor.device.type == "cpu")


def row_indices(rows: Tensor | slice, like: Tensor) -> Tensor | slice:
    """Return an index for ``rows`` of ``like``. A mask becomes indices: indexing by a GPU mask would synchronize."""
    if isinstance(rows, slice):
        return rows
    return to_device_of(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows, like)
