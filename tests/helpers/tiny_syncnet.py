"""Random SyncNet checkpoint in the published format."""

import json
from pathlib import Path

import torch

PUBLISHED = json.loads((Path(__file__).parent / "syncnet_v2.json").read_text())["tensors"]


def published(seed: int = 0, counters: bool = True) -> dict[str, torch.Tensor]:
    """Return a checkpoint with the published names and shapes and random values."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draw) * 0.05 for name, shape in PUBLISHED.items()}
    for name in PUBLISHED:
        if name.endswith("running_var"):
            tensors[name] = tensors[name].abs() + 1
            if counters:
                tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return tensors
