"""Networks of random weights, made where they will run: for measuring, where weights do not matter."""

import torch
from torch import nn

from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from workflows.inference.precision import keep_in_fp32


def random_network(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> AVTransformer:
    """For evaluation. Matrices are normal with std 1 / sqrt(fan in), everything else is 1; embeddings of the noise
    level, output projections, modulation and norms stay float32."""
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
    """Of ``random_network``, counted without making it."""
    with torch.device("meta"):
        model = AVTransformer(config)
    return sum(
        p.numel() * (torch.float32 if keep_in_fp32(name) else dtype).itemsize for name, p in model.named_parameters()
    )


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    model.get_submodule(owner).register_parameter(own, parameter)
