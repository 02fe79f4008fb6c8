"""All initialisation, in one place."""

import math

import torch
from torch import nn

from mfcore.rng import generator

LOCALITY = 1.0


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter; each draws from a generator of its own name, so branches do not disturb each other.

    ============================================  ==============================================================
    parameter                                     start
    ============================================  ==============================================================
    linear weights                                normal, std 1 / sqrt(fan in)
    linear biases                                 0
    embeddings (``absent``, ``nothing``)          normal, std 0.02
    ``anchor``                                    1: the first frame stays
    norm weights                                  1 (``norm_text`` bias 0)
    head offsets of queries and keys              ``LOCALITY``: what is near is read first
    ``table``, ``levels.shared``                  0, except gates of the table: 1 / sqrt(2 layers), quiet residuals
    ``levels.interval``, ``levels.trust``         last layer 0: few-step mode and trust label start without effect
    ``levels.final``, ``head``                    0: the first velocity is 0
    ``phase``                                     0: all latents of a chunk start alike
    ============================================  ==============================================================
    """
    layers = max(
        1,
        max(
            (int(n.split(".blocks.")[1].split(".")[0]) + 1 for n, _ in model.named_parameters() if ".blocks." in n),
            default=1,
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            _fill(name, parameter, generator(seed, f"init/{name}", 0), layers)


def _fill(name: str, parameter: nn.Parameter, draw: torch.Generator, layers: int) -> None:
    zero = (".levels.shared.", ".levels.final.", ".levels.interval.2.", ".levels.trust.2.", ".head.", ".phase.")
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
