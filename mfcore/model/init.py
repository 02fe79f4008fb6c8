"""Initialization of all parameters."""

import math

import torch
from torch import Tensor, nn

from mfcore.rng import generator

LOCALITY = 1.0


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize every parameter from a generator of its name, independent of other branches.

    ============================================  ==============================================================
    parameter                                     start
    ============================================  ==============================================================
    linear weights                                normal, std 1 / sqrt(fan in)
    linear biases                                 0
    embeddings (``absent``, ``nothing``)          normal, std 0.02
    ``anchor``                                    1: mean is the first frame
    norm weights                                  1 (``norm_text`` bias 0)
    head offsets of queries and keys              ``LOCALITY``: attention is local
    ``table``, ``levels.shared``                  0, except gates of the table: 1 / sqrt(2 layers)
    ``levels.interval``, ``levels.trust``         last layer 0: no effect at the start
    ``levels.final``, ``head``                    0: the first velocity is 0
    ``phase``, ``log_std``, ``cross_bias``        0: no effect at the start
    ============================================  ==============================================================
    """
    blocks = [n.split(".blocks.")[1] for n, _ in model.named_parameters() if ".blocks." in n]
    layers = max((int(n.split(".")[0]) + 1 for n in blocks), default=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            _fill(name, parameter, generator(seed, f"init/{name}", 0), layers)


def initial_cross_bias(model: nn.Module, bias: float) -> dict[str, Tensor]:
    """Return the weights of the bias between branches for a value of ``bias``; {} if the network has none."""
    names = (n for n, _ in model.named_parameters() if ".cross_bias." in n)
    return {n: torch.full_like(model.get_parameter(n).detach(), bias) for n in names}


def _fill(name: str, parameter: nn.Parameter, draw: torch.Generator, layers: int) -> None:
    zero = (".levels.shared.", ".levels.final.", ".levels.interval.2.", ".levels.trust.2.", ".head.", ".phase.")
    zero += (".log_std.", ".cross_bias.")
    if any(part in f".{name}" for part in zero):
        parameter.zero_()
    elif name.endswith("table.weight"):
        parameter.zero_()
        parameter[[2, 5]] = 1 / math.sqrt(2 * layers)
    elif name.endswith("anchor.weight"):
        parameter.fill_(1.0)
    elif name.endswith(".offset"):
        parameter.fill_(LOCALITY)
    elif name.endswith("bias"):
        parameter.zero_()
    elif "absent" in name or "nothing" in name:
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    elif parameter.ndim == 2:
        parameter.copy_(torch.randn(parameter.shape, generator=draw) / math.sqrt(parameter.shape[1]))
    else:
        parameter.fill_(1.0)
