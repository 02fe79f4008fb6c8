"""Per-channel whitening of latents, with statistics of the codec or of the first stage that trains on it."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """Mean and standard deviation per channel, separate for the head (first-frame latent).

    Published statistics of a codec with uniform latents (Wan) have equal values in both.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    head_mean: tuple[float, ...] = ()
    head_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.head_mean) != len(self.head_std):
            raise ValueError("latent statistics need as many means as standard deviations")
        if any(s <= 0 for s in self.std + self.head_std):
            raise ValueError("latent statistics contain a standard deviation <= 0: recompute them from more clips")

    def soften(self, power: float) -> "LatentStats":
        """Return the statistics with std raised to ``power``, scaled so whitened latents have mean square 1.

        At 1 every channel has spread 1. Towards 0 channels keep their share of the signal, so noise and loss weight
        large structure more than detail. Raises ValueError for a power outside [0, 1].
        """
        if not 0 <= power <= 1:
            raise ValueError(f"whitening power {power}: use a value from 0 (none) to 1 (full)")
        if power == 1:
            return self
        size = math.sqrt(sum(s ** (2 - 2 * power) for s in self.std) / len(self.std))
        return replace(
            self,
            std=tuple(size * s**power for s in self.std),
            head_std=tuple(size * s**power for s in self.head_std),
        )

    def whiten(self, latents: Float[Tensor, "..."], *, head: bool = False, space: int = 0) -> Tensor:
        """Return (latents - mean) / std along the channel axis, which precedes ``space`` spatial axes."""
        mean, std = self._tensors(latents, head, space)
        return (latents - mean) / std

    def restore(self, latents: Float[Tensor, "..."], *, head: bool = False, space: int = 0) -> Tensor:
        """Invert :meth:`whiten`."""
        mean, std = self._tensors(latents, head, space)
        return latents * std + mean

    def _tensors(self, latents: Tensor, head: bool, space: int) -> tuple[Tensor, Tensor]:
        means, stds = (self.head_mean, self.head_std) if head else (self.mean, self.std)
        if latents.shape[-1 - space] != len(means):
            raise ValueError(f"latents have {latents.shape[-1 - space]} channels, the statistics {len(means)}")
        shape = (len(means),) + (1,) * space
        mean = torch.tensor(means, dtype=latents.dtype, device=latents.device).reshape(shape)
        return mean, torch.tensor(stds, dtype=latents.dtype, device=latents.device).reshape(shape)
