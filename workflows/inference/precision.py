"""In which numbers networks generate: float32, or bfloat16 for weights, products and what is remembered."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP32_NAME_PARTS = ("levels.", "head.", "table.", "norm", "anchor")  # parts of a name: float32 whatever the others are


def default_precision(device: torch.device) -> Precision:
    """What is used where nothing is asked for."""
    return "bf16" if device.type == "cuda" else "fp32"


def keep_in_fp32(name: str) -> bool:
    """Whether the weight of that name stays float32: of noise levels, modulation, norms and output."""
    return any(part in name for part in FP32_NAME_PARTS)


def cast_weights(model: nn.Module, precision: Precision) -> nn.Module:
    """``model`` itself, its weights in that precision: for generating, no longer for training."""
    for name, weight in model.named_parameters():
        if not keep_in_fp32(name):
            weight.data = weight.data.to(DTYPES[precision])
    return model


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Inside, products are in that precision; with float32 as whoever calls has them."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
