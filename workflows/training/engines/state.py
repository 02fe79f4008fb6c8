"""The state of one network on the ranks of a run: whole float32 tensors by parameter name, every rank some of them.

So a state moves between engines, ZeRO stages and numbers of ranks without conversion, and nothing pickled is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workflows.utils import distributed


@dataclass(frozen=True, kw_only=True)
class StateShard:
    """This rank's part of a network's state, copied to this machine's memory: training may go on."""

    tensors: dict[str, Tensor]  # "weight/<parameter>", "exp_avg/<parameter>" ... -> value
    steps: int  # optimizer steps done

    def write(self, folder: Path, name: str) -> Path:
        """The file of this rank for the network ``name``."""
        path = folder / f"{name}-{distributed.get_rank():05d}-of-{distributed.get_world_size():05d}.safetensors"
        save_file(self.tensors, path, metadata={"steps": str(self.steps)})
        return path


def shard_state(tensors: Iterator[tuple[str, str, Tensor]], steps: int) -> StateShard:
    """Copies of those of ``tensors`` (kind, parameter, value; the same walk on all ranks) that fall to this rank."""
    mine: dict[str, Tensor] = {}
    turn: dict[str, int] = {}
    for kind, parameter, value in tensors:
        if turn.setdefault(parameter, len(turn)) % distributed.get_world_size() == distributed.get_rank():
            mine[f"{kind}/{parameter}"] = to_cpu_copy(value)
    return StateShard(tensors=mine, steps=steps)


def to_cpu_copy(value: Tensor) -> Tensor:
    """A copy that later steps do not change: float32, in this machine's memory."""
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


class ShardedStateReader:
    """What the ranks' snapshots hold, read tensor by tensor."""

    def __init__(self, folder: Path, name: str) -> None:
        files = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no state of the network {name!r}")
        self._where: dict[str, Any] = {}
        self.steps = 0
        for path in files:
            handle = safe_open(path, framework="pt")
            self.steps = int(handle.metadata()["steps"])
            self._where |= dict.fromkeys(handle.keys(), handle)
        self._folder = folder

    def has(self, kind: str, parameter: str) -> bool:
        return f"{kind}/{parameter}" in self._where

    def read(self, kind: str, parameter: str) -> Tensor:
        return self._where[f"{kind}/{parameter}"].get_tensor(f"{kind}/{parameter}")

    def check_shapes(self, shapes: dict[str, torch.Size]) -> None:
        """Names and shapes must be the network's own."""
        saved = {key.removeprefix("weight/"): h for key, h in self._where.items() if key.startswith("weight/")}
        if saved.keys() != shapes.keys():
            odd = sorted(saved.keys() ^ shapes.keys())[:3]
            raise ValueError(f"{self._folder} holds the state of another network: {', '.join(odd)} ... differ")
        for name, handle in saved.items():
            shape = tuple(handle.get_slice(f"weight/{name}").get_shape())
            if shape != tuple(shapes[name]):
                raise ValueError(f"{self._folder}: {name} is {shape} there and {tuple(shapes[name])} here")


MOMENTS = ("exp_avg", "exp_avg_sq")
