"""Functions that run the two parts of a block: eager, or compiled to one graph that all layers share."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.model.block import Block

MAX_RECOMPILES = 64  # of one part: training, streaming, sink, each with and without gradient


class CompilerNotFoundError(UserInputError):
    """Missing requirement of torch.compile on this machine."""


@dataclass(frozen=True, kw_only=True)
class BlockKernels:
    """Functions of a block; the first argument is the block."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project
    update: Callable[..., Tensor] = Block.update


EAGER = BlockKernels()


@cache
def compile_block(backend: str = "inductor") -> BlockKernels:
    """Return compiled functions, without graph breaks. They compile on the first call for each kind of shape."""
    dynamo = cast(Any, torch)._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_RECOMPILES)
    project, update = (torch.compile(part, backend=backend, fullgraph=True) for part in (Block.project, Block.update))
    return BlockKernels(project=cast(Any, project), update=cast(Any, update))


def check_compiler(device: torch.device) -> None:
    """Raise CompilerNotFoundError if a CPU has no C++ compiler, or a GPU no Triton or C compiler."""
    on_cpu = device.type == "cpu"
    compilers = (os.environ.get("CXX"), "g++", "clang++") if on_cpu else (os.environ.get("CC"), "gcc", "clang")
    missing = [] if any(name and shutil.which(name) for name in compilers) else [f"a compiler ({compilers[1]})"]
    if not on_cpu and importlib.util.find_spec("triton") is None:
        missing.append("Triton (pip install triton)")
    if missing:
        raise CompilerNotFoundError(
            f"compiling blocks for {device.type} needs {' and '.join(missing)}, not found here: install it "
            "(apt-get install g++), set CC or CXX, or turn engine.compile and --compile off"
        )
