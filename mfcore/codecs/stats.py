"""Per-channel whitening of latents. Statistics belong to the codec or are frozen by the first stage that trains it."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """Mean and standard deviation per channel; the head (first-frame latent) may have its own.

    Published statistics of a codec that treats all latents alike (Wan) put the same numbers in both.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    head_mean: tuple[float, ...] = ()
    head_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.head_mean) != len(self.head_std):
            raise ValueError("latent statistics need as many means as standard deviations")
        if any(s <= 0 for s in self.std + self.head_std):
            raise ValueError("latent statistics hold a standard deviation <= 0: recompute them from more clips")

    def soften(self, power: float) -> "LatentStats":
        """The same with spreads raised to ``power``, scaled so that whitened latents keep a mean square of 1.

        1: every channel has spread 1. Towards 0: channels keep the proportions in which they make up the signal, so
        noise and loss weigh them as the eye does, and what is large is settled at higher noise levels than detail.
        """
        if not 0 <= power <= 1:
            raise ValueError(f"the power of whitening must be between 0 (none) and 1 (full), got {power}")
        if power == 1:
            return self
        size = math.sqrt(sum(s ** (2 - 2 * power) for s in self.std) / len(self.std))
        return replace(
            self,
            std=tuple(size * s**power for s in self.std),
            head_std=tuple(size * s**power for s in self.head_std),
        )

    def whiten(self, latents: Float[Tensor, "..."], *, head: bool = False, space: int = 0) -> Tensor:
        """(latents - mean) / std along the channel axis, which is followed by ``space`` spatial axes."""
        mean, std = self._tensors(latents, head, space)
        return (latents - mean) / std

    def restore(self, latents: Float[Tensor, "..."], *, head: bool = False, space: int = 0) -> Tensor:
        """Inverse of ``whiten``."""
        mean, std = self._tensors(latents, head, space)
        return latents * std + mean

    def _tensors(self, latents: Tensor, head: bool, space: int) -> tuple[Tensor, Tensor]:
        means, stds = (self.head_mean, self.head_std) if head else (self.mean, self.std)
        if latents.shape[-1 - space] != len(means):
            raise ValueError(f"latents have {latents.shape[-1 - space]} channels, the statistics {len(means)}")
        shape = (len(means),) + (1,) * space
        mean = torch.tensor(means, dtype=latents.dtype, device=latents.device).reshape(shape)
        return mean, torch.tensor(stds, dtype=latents.dtype, device=latents.device).reshape(shape)
