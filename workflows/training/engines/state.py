"""Sharded state of one network: complete float32 tensors by parameter name, distributed over the ranks.

A state moves between engines, ZeRO stages and numbers of ranks without conversion, and no pickle is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mfcore.errors import UserInputError
from workflows.utils import distributed


@dataclass(frozen=True, kw_only=True)
class StateShard:
    """State of a network on one rank, copied to CPU memory so that training can continue."""

    tensors: dict[str, Tensor]  # "weight/<parameter>", "exp_avg/<parameter>" ... -> value
    steps: int  # optimizer steps done

    def write(self, folder: Path, name: str) -> Path:
        """Write the file of this rank for the network ``name`` and return its path."""
        path = folder / f"{name}-{distributed.get_rank():05d}-of-{distributed.get_world_size():05d}.safetensors"
        save_file(self.tensors, path, metadata={"steps": str(self.steps)})
        return path


def shard_state(tensors: Iterator[tuple[str, str, Tensor]], steps: int) -> StateShard:
    """Copy the tensors (kind, parameter, value) of this rank. All ranks must iterate over the same sequence."""
    shard: dict[str, Tensor] = {}
    index: dict[str, int] = {}
    for kind, parameter, value in tensors:
        if index.setdefault(parameter, len(index)) % distributed.get_world_size() == distributed.get_rank():
            shard[f"{kind}/{parameter}"] = to_cpu_copy(value)
    return StateShard(tensors=shard, steps=steps)


def to_cpu_copy(value: Tensor) -> Tensor:
    """Return a float32 copy in CPU memory."""
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


class ShardedStateReader:
    """Reader of the state files of all ranks, tensor by tensor."""

    def __init__(self, folder: Path, name: str) -> None:
        files = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        if not files:
            raise UserInputError(f"{folder} has no state of the network {name!r}")
        self._files: dict[str, Any] = {}
        self.steps = 0
        for path in files:
            handle = safe_open(path, framework="pt")
            self.steps = int(handle.metadata()["steps"])
            self._files |= dict.fromkeys(handle.keys(), handle)
        self._folder = folder

    def has(self, kind: str, parameter: str) -> bool:
        """Return True if the state has this tensor."""
        return f"{kind}/{parameter}" in self._files

    def read(self, kind: str, parameter: str) -> Tensor:
        """Return one tensor: kind "weight" or one of ``MOMENTS``."""
        return self._files[f"{kind}/{parameter}"].get_tensor(f"{kind}/{parameter}")

    def check_shapes(self, shapes: dict[str, torch.Size]) -> None:
        """Raise ValueError unless names and shapes equal those of the network."""
        saved = {key.removeprefix("weight/"): h for key, h in self._files.items() if key.startswith("weight/")}
        if saved.keys() != shapes.keys():
            differences = sorted(saved.keys() ^ shapes.keys())[:3]
            raise UserInputError(
                f"{self._folder} has the state of another network: {', '.join(differences)} ... differ"
            )
        for name, handle in saved.items():
            shape = tuple(handle.get_slice(f"weight/{name}").get_shape())
            if shape != tuple(shapes[name]):
                raise UserInputError(f"{self._folder}: {name} is {shape} there and {tuple(shapes[name])} here")


MOMENTS = ("exp_avg", "exp_avg_sq")
