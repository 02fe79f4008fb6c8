"""Inference precision: float32, or bfloat16 for weights, matrix products and the KV cache."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# parts of names of weights that stay float32
FP32_NAME_PARTS = ("levels.", "head.", "table.", "norm", "anchor", "log_std")


def default_precision(device: torch.device) -> Precision:
    """Return bf16 on a GPU, else fp32."""
    return "bf16" if device.type == "cuda" else "fp32"


def keep_in_fp32(name: str) -> bool:
    """Return True if a weight stays float32: those of noise levels, modulation, norms and output."""
    return any(part in name for part in FP32_NAME_PARTS)


def cast_weights(model: nn.Module, precision: Precision) -> nn.Module:
    """Cast the weights of ``model`` in place, for inference only, and return it."""
    for name, weight in model.named_parameters():
        if not keep_in_fp32(name):
            weight.data = weight.data.to(DTYPES[precision])
    return model


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the autocast context for ``precision``; float32 leaves the autocast of the caller unchanged."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
