"""In which numbers networks generate: float32, or bfloat16 for weights, products and what is remembered."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = ("levels.", "head.", "table.", "norm", "anchor")  # parts of a name: float32 whatever the others are


def usual(device: torch.device) -> Precision:
    """What is used where nothing is asked for."""
    return "bf16" if device.type == "cuda" else "fp32"


def is_wide(name: str) -> bool:
    """Whether the weight of that name stays float32: of noise levels, modulation, norms and output."""
    return any(part in name for part in WIDE)


def narrow(model: nn.Module, precision: Precision) -> nn.Module:
    """``model`` itself, its weights in that precision: for generating, no longer for training."""
    for name, weight in model.named_parameters():
        if not is_wide(name):
            weight.data = weight.data.to(DTYPES[precision])
    return model


def computing(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Inside, products are in that precision; with float32 as whoever calls has them."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
