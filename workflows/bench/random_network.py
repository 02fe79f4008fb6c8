"""Networks with random weights, allocated on the target device, for benchmarks."""

import torch
from torch import nn

from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from workflows.inference.precision import keep_in_fp32


def random_network(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> AVTransformer:
    """Return an evaluation network with matrices of std 1 / sqrt(fan in) and ones elsewhere.

    Noise-level embeddings, output projections, modulation and norms stay float32.
    """
    with torch.device("meta"):
        model = AVTransformer(config)
    for name, parameter in model.named_parameters():
        kept = torch.empty(parameter.shape, device=device, dtype=torch.float32 if keep_in_fp32(name) else dtype)
        _replace(model, name, nn.Parameter(kept, requires_grad=False))
    draw = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=draw)
        else:
            parameter.fill_(1.0)
    return model.eval()


def random_network_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of ``random_network`` without allocating it."""
    with torch.device("meta"):
        model = AVTransformer(config)
    return sum(
        p.numel() * (torch.float32 if keep_in_fp32(name) else dtype).itemsize for name, p in model.named_parameters()
    )


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner).register_parameter(own, parameter)
