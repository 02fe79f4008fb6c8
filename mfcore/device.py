"""Small numbers of the CPU (positions, levels, random draws, numbers of rows) to where the latents are."""

import torch
from torch import Tensor


def to_device_of(small: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``small`` on the device of ``like``, in its own type unless said otherwise.

    A plain ``to`` makes the CPU wait until the GPU has done all that it was asked for so far. From the CPU it need not:
    CUDA has read ordinary memory when the call returns. In the other direction it would have to.
    """
    return small.to(like.device, dtype or small.dtype, non_blocking=small.device.type == "cpu")


def row_indices(rows: Tensor | slice, like: Tensor) -> Tensor | slice:
    """What picks ``rows`` of ``like``: a mask becomes numbers, which on a GPU would be counted first."""
    if isinstance(rows, slice):
        return rows
    return to_device_of(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows, like)
