"""Weights and layers at DeepSpeed's ZeRO stage 3, where every rank keeps its part of each weight."""

import contextlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from workflows.utils import distributed


class Zero3ParameterAccess:
    """Frozen weights below a ZeRO-3 engine: each rank keeps an equal part of each, and small ones whole besides."""

    def __init__(self, deepspeed: Any) -> None:
        self._ds = deepspeed

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        kept = cast(Any, p)
        yield kept.ds_tensor, local_shard(value.to(kept.ds_tensor.device))
        if p.numel() == value.numel():  # gathered for good
            yield p.data, value.to(p.device)

    def value(self, p: nn.Parameter) -> Tensor:
        with gathered(self._ds, p):
            return p.detach().cpu().clone()


def gathered(deepspeed: Any, p: nn.Parameter, *, change: bool = False) -> contextlib.AbstractContextManager[Any]:
    """The parameter unsharded; with ``change``, what rank 0 makes of it inside is kept."""
    return deepspeed.zero.GatheredParameters([p], modifier_rank=0 if change else None)


def local_shard(value: Tensor) -> Tensor:
    """This rank's part of a weight, as ZeRO-3 cuts it: equal parts, the last one padded with zeros."""
    size = -(-value.numel() // distributed.get_world_size())
    flat = nn.functional.pad(value.flatten(), (0, size * distributed.get_world_size() - value.numel()))
    return flat.narrow(0, size * distributed.get_rank(), size)


def patch_zero3_linear(deepspeed: Any) -> None:
    """Let linear layers under autocast round once, as torch's do.

    DeepSpeed puts a layer of its own in the place of ``torch.nn.functional.linear``, for this whole process. Under
    autocast it adds the bias to a product that is already bfloat16, unless the input has two dimensions: then both are
    one operation.
    """
    theirs = deepspeed.runtime.zero.linear.zero3_linear_wrap

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return theirs(input, weight)
        flat = theirs(input.reshape(-1, input.shape[-1]), weight, bias)
        return flat.reshape(*input.shape[:-1], flat.shape[-1])

    if nn.functional.linear is theirs:
        torch.nn.functional.linear = linear
