"""What runs the two parts of a block: the methods as they are written, or compiled, one graph that all layers share."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from mfcore.model.block import Block

MAX_RECOMPILES = 64  # of one part: of training, streaming, the sink, with and without gradient


class CompilerNotFoundError(ValueError):
    """torch.compile cannot work on this machine."""


@dataclass(frozen=True, kw_only=True)
class BlockKernels:
    """Called with the block first."""

    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = Block.project
    update: Callable[..., Tensor] = Block.update


EAGER = BlockKernels()


@cache
def compile_block(backend: str = "inductor") -> BlockKernels:
    """Compiled where they are first called with tensors of other shapes or kinds; nothing is left to Python inside."""
    dynamo = cast(Any, torch)._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_RECOMPILES)
    project, update = (torch.compile(part, backend=backend, fullgraph=True) for part in (Block.project, Block.update))
    return BlockKernels(project=cast(Any, project), update=cast(Any, update))


def check_compiler(device: torch.device) -> None:
    """NoCompiler says what is missing: on a CPU a C++ compiler, on a GPU Triton and a C compiler."""
    on_cpu = device.type == "cpu"
    known = (os.environ.get("CXX"), "g++", "clang++") if on_cpu else (os.environ.get("CC"), "gcc", "clang")
    missing = [] if any(name and shutil.which(name) for name in known) else [f"a compiler ({known[1]})"]
    if not on_cpu and importlib.util.find_spec("triton") is None:
        missing.append("Triton (pip install triton)")
    if missing:
        raise CompilerNotFoundError(
            f"compiling blocks for {device.type} needs {' and '.join(missing)}, not found here: install it "
            "(apt-get install g++), name it in CC or CXX, or leave engine.compile and --compile off"
        )
