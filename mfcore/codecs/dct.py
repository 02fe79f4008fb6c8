"""Embedded video codec: a truncated 3-D cosine transform. No weights, no download, exact arithmetic.

Letters: f frames, n groups, C kept coefficients (latent channels), h w latent height and width, g frames of a group,
p block edge in pixels.

The first frame is encoded alone: each p x p block of its Y, Cb, Cr planes is transformed in two dimensions. Later
frames form groups of g; each p x p x g block is transformed in three dimensions. Of the 3 p p g coefficients of a
block, the first C of a fixed order are kept (:func:`_order`). Color and cosine transforms form one matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from mfcore.codecs.base import Codec
from mfcore.errors import UserInputError, check_range
from mfcore.timeline import LatentClock, video_clock

# BT.601 full range, rows Y, Cb, Cr of an RGB triple. A unit error of Y, Cb and Cr is a squared RGB error of 3.0, 3.3
# and 2.5, so one scale ranks all three planes.
_RGB_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])

# The order of the coefficients: cost = hypot(u, v) + _TIME * t (+ _CHROMA for Cb and Cr), u, v, t the indices of the
# cosines. Fitted at 64 x 64 on real and drawn talking heads: a _TIME of 3.5 gives 1 dB more on real video but blurs the
# mouth in time (its correlation with speech falls from 0.95 to 0.86). Drawings need a low _CHROMA.
_TIME = 1.5
_CHROMA = 2.0

# The latent of a block of constant luminance in [-1, 1] is _GAIN times that luminance. With 4, the usual spread over a
# dataset (0.25 to 0.5 of full scale) becomes 1 to 2, and detail coefficients stay within an order of magnitude.
_GAIN = 4.0

# Pixel values per product: 4 MB of float32 fit into the cache; whole clips take five times as long.
_BATCH_PIXELS = 2**20


@dataclass(frozen=True, kw_only=True)
class DctConfig:
    """Shape of the transform. Equal configurations give interchangeable latents."""

    channels: int = 48  # coefficients kept per block
    block: int = 8  # block edge, pixels
    group: int = 4  # frames per latent after the first frame
    fps: Fraction = Fraction(24)  # frames per second; does not change the latents, only their clock

    def __post_init__(self) -> None:
        max_channels = 3 * self.block**2
        check_range("block", self.block, 1, 256)
        check_range("group", self.group, 1, 64)
        check_range("fps", self.fps, 0, 1000, above=True)
        if not 1 <= self.channels <= max_channels:
            raise UserInputError(f"channels={self.channels}: use 1 to {max_channels} for block={self.block}")


class DctCodec(Codec):
    """Latents ``(1 + n, C, H / block, W / block)`` float32 of ``1 + n * group`` frames.

    The transform is orthonormal up to the color matrix and one gain. A static video has equal values in frame and group
    latents in the coefficients that both share; these come first. Frames after the first that do not fill a group are
    dropped.
    """

    def __init__(self, config: DctConfig | None = None) -> None:
        self.config = c = config or DctConfig()
        self.id = f"dct-v1/c{c.channels}/b{c.block}/g{c.group}"
        self.channels = c.channels
        self._frame = _Basis(c, frames=1)
        self._group = _Basis(c, frames=c.group)
        # The static channels are those before the first difference of the two orders.
        self.static_channels = int((self._frame.order == self._group.order).all(axis=1).cumprod().sum())

    @property
    def clock(self) -> LatentClock:
        """Rate and offset of the latents."""
        return video_clock(Fraction(self.config.fps), self.config.group)

    def frames(self, latents: int) -> int:
        """Return the number of frames of ``latents`` latents."""
        return 0 if latents == 0 else 1 + (latents - 1) * self.config.group

    def encode(self, signal: UInt8[Tensor, "f H W 3"]) -> Float[Tensor, "n C h w"]:
        """Return the latents of RGB frames. Raises ValueError for a wrong type, no frame, or a wrong frame size."""
        self._check(signal)
        groups = (len(signal) - 1) // self.config.group
        first, rest = signal[:1], signal[1 : 1 + groups * self.config.group]
        return torch.cat([self._frame.analyze(first), self._group.analyze(rest)])

    def decode(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """Return the RGB frames of the first-frame latent and any number of group latents."""
        return self.decoder().push(latents)

    def decoder(self) -> "DctDecoder":
        """Return a new streaming decoder."""
        return DctDecoder(self._frame.synthesize, self._group.synthesize)

    def _check(self, signal: Tensor) -> None:
        if signal.dtype != torch.uint8 or signal.ndim != 4 or signal.shape[-1] != 3 or len(signal) == 0:
            raise ValueError(
                f"video must be uint8 (frames, height, width, 3) with at least one frame; got {signal.dtype} "
                f"{tuple(signal.shape)}"
            )
        height, width = signal.shape[1:3]
        block = self.config.block
        if height % block or width % block or 0 in (height, width):
            raise UserInputError(f"frame size {width}x{height}: scale or crop both edges to multiples of {block}")


class DctDecoder:
    """Streaming decoder: the first latent is the first frame, each later one a group of frames."""

    def __init__(self, frame: Callable[[Tensor], Tensor], group: Callable[[Tensor], Tensor]) -> None:
        self._frame, self._group = frame, group
        self._started = False
        self._empty = torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def push(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """Return all frames of ``latents``; groups are independent, so there is no delay."""
        head = latents[:0] if self._started else latents[:1]
        self._started = self._started or len(latents) > 0
        frames = torch.cat([self._frame(head), self._group(latents[len(head) :])])
        self._empty = frames[:0]
        return frames

    def flush(self) -> UInt8[Tensor, "f H W 3"]:
        """Return no frames."""
        return self._empty

    def state(self) -> dict[str, Tensor]:
        """Return whether the first frame was decoded."""
        return {"started": torch.tensor(self._started), "empty": self._empty}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._started, self._empty = bool(state["started"]), state["empty"]


class _Basis:
    """Analysis and synthesis of blocks of ``frames`` frames as two matrices."""

    def __init__(self, config: DctConfig, frames: int) -> None:
        self.block, self.frames = config.block, frames
        self.order = order = _order(config, frames)
        waves = np.einsum("ti,uj,vk->tuvijk", *(dct_matrix(n) for n in (frames, config.block, config.block)))
        kept = waves[order[:, 0], order[:, 1], order[:, 2]]  # (C, g, p, p)
        # A constant block of value 1 has the coefficient sqrt(g p p) before this scaling.
        gain = _GAIN / np.sqrt(frames * config.block**2)
        plane = order[:, 3]
        self._analysis = self._matrix(kept, _RGB_TO_YCC[plane]) * gain
        self._synthesis = self._matrix(kept, np.linalg.inv(_RGB_TO_YCC).T[plane]) / gain

    @staticmethod
    def _matrix(kept: Float64[np.ndarray, "C g p q"], color: Float64[np.ndarray, "C 3"]) -> Tensor:
        return torch.from_numpy(rearrange(np.einsum("cgpq,cr->cgpqr", kept, color), "c g p q r -> c (g p q r)"))

    def analyze(self, frames: UInt8[Tensor, "f H W 3"]) -> Float[Tensor, "n C h w"]:
        parts = frames.split(self._batch_groups(frames.shape[1:].numel()) * self.frames)
        return torch.cat([self._analyze(part) for part in parts])

    def synthesize(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        parts = latents.split(self._batch_groups(3 * self.block**2 * latents.shape[2:].numel()))
        return torch.cat([self._synthesize(part) for part in parts])

    def _batch_groups(self, values_per_frame: int) -> int:
        """Return the number of groups per product."""
        return max(1, _BATCH_PIXELS // (values_per_frame * self.frames))

    def _analyze(self, frames: UInt8[Tensor, "f H W 3"]) -> Float[Tensor, "n C h w"]:
        h, w = (edge // self.block for edge in frames.shape[1:3])
        pixels = rearrange(
            frames, "(n g) (h p) (w q) r -> (n h w) (g p q r)", g=self.frames, p=self.block, q=self.block
        )
        analysis, black = self._to_latent
        latents = torch.addmm(black.to(frames.device), pixels.float(), analysis.to(frames.device))
        return rearrange(latents, "(n h w) c -> n c h w", h=h, w=w)

    def _synthesize(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        h, w = latents.shape[2:]
        synthesis, gray = self._to_pixels
        coefficients = rearrange(latents.float(), "n c h w -> (n h w) c")
        pixels = torch.addmm(gray.to(latents.device), coefficients, synthesis.to(latents.device))
        pixels = pixels.round_().clamp_(0, 255).to(torch.uint8)
        return rearrange(
            pixels, "(n h w) (g p q r) -> (n g) (h p) (w q) r", h=h, w=w, g=self.frames, p=self.block, q=self.block
        )

    @cached_property
    def _to_latent(self) -> tuple[Float[Tensor, "pixels C"], Float[Tensor, " C"]]:
        """Matrix and latent of black for pixels in 0 .. 255, including the map to [-1, 1]."""
        return (self._analysis.T / 127.5).float(), -self._analysis.sum(1).float()

    @cached_property
    def _to_pixels(self) -> tuple[Float[Tensor, "C pixels"], Float[Tensor, " pixels"]]:
        """Matrix and pixel of a zero latent, mid-gray."""
        return (self._synthesis * 127.5).float(), torch.full(self._synthesis.shape[1:], 127.5)


def dct_matrix(n: int) -> Float64[np.ndarray, "n n"]:
    """Return the orthonormal DCT-II matrix, frequency by position."""
    k, i = np.arange(n)[:, None], np.arange(n)
    scale = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n))
    return scale * np.cos(np.pi * (2 * i + 1) * k / (2 * n))


def _order(config: DctConfig, frames: int) -> np.ndarray:
    """Return rows ``(t, u, v, plane)`` of the kept coefficients by cost, static ones (t = 0) before others.

    The static rows of the frame order and of the group order have a common prefix, because both rank by the same cost.
    """
    grid = np.indices((frames, config.block, config.block, 3)).reshape(4, -1).T
    t, u, v, plane = grid.T
    scale = 8 / config.block  # frequencies in cycles per pixel count, not indices
    cost = scale * np.hypot(u, v) + _TIME * t + _CHROMA * (plane > 0)
    kept = np.lexsort((plane, v, u, t, cost))[: config.channels]
    static_first = np.argsort(t[kept] > 0, kind="stable")
    return grid[kept[static_first]]
