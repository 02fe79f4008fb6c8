"""AdamW and its learning rate schedule."""

from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn

from mfcore.errors import check_range


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer of one network. Defaults are those of the paper (METHOD 5)."""

    lr: float = 5e-5  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the moments of AdamW
    weight_decay: float = 0.02  # on weights of linear layers only
    clip: float = 0.5  # largest gradient norm
    warm_up: int = 100  # steps of linear warm-up
    final: float = 1.0  # learning rate at the end of the stage over its peak; 1 keeps it constant

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0, 100, above=True)
        check_range("betas", min(self.betas), 0, 0.999999)
        check_range("betas", max(self.betas), 0, 0.999999)
        check_range("weight_decay", self.weight_decay, 0, 100)
        check_range("clip", self.clip, 0, 1e9, above=True)
        check_range("warm_up", self.warm_up, 0, 10**9)
        check_range("final", self.final, 0, 1)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of ``step`` (from 0): linear warm-up, then a half cosine to ``final`` at ``steps``."""
    if step < config.warm_up:
        return config.lr * (step + 1) / config.warm_up
    progress = (step - config.warm_up) / max(1, steps - config.warm_up)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + cos(pi * min(1.0, progress))))


def build_adamw(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable weights, with weight decay on weights of linear layers only.

    Biases, gains, single embeddings and tables do not decay, of any shape.
    """
    decayed = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)
