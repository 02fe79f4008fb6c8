"""Memory that a case needs, checked before it is allocated."""

import torch

from workflows.training.memory_check import available_memory
from workflows.utils.case_worker import CaseSkippedError


def require_device_memory(device: torch.device, needed: int) -> None:
    """Raise CaseSkippedError if the device has less free memory, in bytes."""
    free = available_memory(device)
    if free is not None and needed > free:
        raise CaseSkippedError(f"it needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
