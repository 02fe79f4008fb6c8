"""Weights and layers at DeepSpeed's ZeRO stage 3, where each rank has a shard of each weight."""

import contextlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from workflows.utils import distributed


class Zero3ParameterAccess:
    """Access to frozen weights below a ZeRO-3 engine: equal shards, and small weights also gathered."""

    def __init__(self, deepspeed: Any) -> None:
        self._ds = deepspeed

    def places(self, p: nn.Parameter, value: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield the local tensors of a weight, each with its part of ``value``."""
        sharded = cast(Any, p)
        yield sharded.ds_tensor, local_shard(value.to(sharded.ds_tensor.device))
        if p.numel() == value.numel():  # permanently gathered
            yield p.data, value.to(p.device)

    def value(self, p: nn.Parameter) -> Tensor:
        """Return the whole weight on the CPU."""
        with gathered(self._ds, p):
            return p.detach().cpu().clone()


def gathered(deepspeed: Any, p: nn.Parameter, *, change: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Gather the parameter while the block runs; with ``change``, keep what rank 0 writes into it."""
    return deepspeed.zero.GatheredParameters([p], modifier_rank=0 if change else None)


def local_shard(value: Tensor) -> Tensor:
    """Return this rank's shard of a weight as in ZeRO-3: equal parts, the last one padded with zeros."""
    size = -(-value.numel() // distributed.get_world_size())
    flat = nn.functional.pad(value.flatten(), (0, size * distributed.get_world_size() - value.numel()))
    return flat.narrow(0, size * distributed.get_rank(), size)


def patch_zero3_linear(deepspeed: Any) -> None:
    """Patch DeepSpeed's linear layer so that autocast rounds once, as ``torch.nn.functional.linear`` does.

    DeepSpeed replaces ``torch.nn.functional.linear`` in the whole process. Under autocast its layer adds the bias to a
    bfloat16 product, unless the input has two dimensions: then product and bias are one operation.
    """
    deepspeed_linear = deepspeed.runtime.zero.linear.zero3_linear_wrap

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return deepspeed_linear(input, weight)
        flat = deepspeed_linear(input.reshape(-1, input.shape[-1]), weight, bias)
        return flat.reshape(*input.shape[:-1], flat.shape[-1])

    if nn.functional.linear is deepspeed_linear:
        torch.nn.functional.linear = linear
