"""Wan's causal video autoencoder through diffusers, from a local folder: 2.1 (16 channels, 8 x 8 x 4) and 2.2 (48
channels, 16 x 16 x 4).

Letters: b batch, f frames, n latents, C latent channels, h w latent height and width, p block edge in pixels.

The first frame stands alone, each further latent describes four frames and sees all before it through a cache of
features. So decoding latent by latent with that cache is decoding the whole, to the bit.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from mfcore.codecs.base import Codec
from mfcore.codecs.pretrained import (
    compute_device,
    compute_dtype,
    locate_weights,
    model_folder,
    read_config,
    weights_digest,
)
from mfcore.codecs.stats import LatentStats
from mfcore.timeline import LatentClock, video_clock

_CLASS = "AutoencoderKLWan"
_GROUP = 4  # frames per latent after the first: fixed in diffusers' encoder


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Which weights, and what their latents look like. :func:`read_wan` fills it from a folder."""

    channels: int
    block: int  # block edge, pixels
    weights: str  # digest of configuration and tensors
    group: int = _GROUP
    fps: Fraction = Fraction(24)  # frames per second; does not change the latents, only their clock
    folder: str = ""  # where the weights were last seen; changes nothing

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.group != _GROUP or min(self.channels, self.block) < 1:
            raise ValueError(f"Wan needs positive fps, channels and block, and group={_GROUP}; got {self}")


def wan_config_from_folder(folder: str, fps: Fraction = Fraction(24)) -> WanConfig:
    """The configuration of the autoencoder in ``folder`` (or its ``vae/``). ValueError when there is none."""
    place = model_folder(folder, "vae", (_CLASS,), "Wan autoencoder (diffusers AutoencoderKLWan)")
    facts = read_config(place / "config.json")
    temporal = 2 ** sum(facts.get("temperal_downsample", (False, True, True)))
    if temporal != _GROUP:
        raise ValueError(f"{place} has {temporal} frames per latent: Wan's autoencoders have {_GROUP}")
    return WanConfig(
        channels=int(facts.get("z_dim", 16)),
        block=2 ** (len(facts.get("dim_mult", (1, 2, 4, 4))) - 1) * int(facts.get("patch_size") or 1),
        weights=weights_digest(place),
        fps=fps,
        folder=folder,
    )


class WanCodec(Codec):
    """Latents ``(1 + n, C, H / block, W / block)`` float32 of ``1 + 4 n`` frames: the mean of the posterior, raw.

    Frames after the first that do not fill a group of four are dropped. The weights load at first use.
    """

    def __init__(self, config: WanConfig, device: torch.device | str | None = None) -> None:
        self.config = c = config
        self.id = f"wan-v1/c{c.channels}/b{c.block}/g{c.group}/{c.weights}"
        self.channels = self.static_channels = c.channels  # all latents have the same channels
        self.device = compute_device(device)

    @property
    def clock(self) -> LatentClock:
        return video_clock(Fraction(self.config.fps), self.config.group)

    @property
    def published_stats(self) -> LatentStats:
        """Mean and standard deviation per channel, from the model's own configuration."""
        facts = read_config(self._folder / "config.json")
        mean, std = tuple(map(float, facts["latents_mean"])), tuple(map(float, facts["latents_std"]))
        return LatentStats(mean=mean, std=std, head_mean=mean, head_std=std)

    @cached_property
    def _folder(self) -> Path:
        folder = locate_weights(
            self.config.weights, self.config.folder, lambda f: wan_config_from_folder(f).weights, self.id
        )
        return model_folder(folder, "vae", (_CLASS,), "Wan autoencoder")

    @cached_property
    def model(self) -> Any:
        """diffusers' AutoencoderKLWan on the codec's device, bfloat16 on a GPU. ValueError when it is not found."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        model: Any = AutoencoderKLWan.from_pretrained(
            self._folder,
            torch_dtype=compute_dtype(self.device),
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
        return model.to(self.device).eval().requires_grad_(False)

    def load(self) -> None:
        """Read the weights. ValueError when they are not found."""
        assert self.model

    def encode(self, signal: UInt8[Tensor, "f H W 3"]) -> Float[Tensor, "n C h w"]:
        """Latents of RGB frames. ValueError for a wrong type, no frame, or an edge that the block does not divide."""
        return self.encode_batch(signal[None])[0]

    def encode_batch(self, signals: UInt8[Tensor, "b f H W 3"]) -> Float[Tensor, "b n C h w"]:
        """The same of clips of one length."""
        self._check(signals)
        frames = 1 + (signals.shape[1] - 1) // _GROUP * _GROUP
        pixels = rearrange(signals[:, :frames].to(self.device), "b f h w r -> b r f h w")
        with torch.inference_mode():
            found = self.model.encode(pixels.to(self.model.dtype) / 127.5 - 1, return_dict=False)[0]
            latents: Tensor = found.mode()
        return rearrange(latents.float().cpu(), "b c n h w -> b n c h w").clone()

    def decode(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """RGB frames of the first-frame latent and any number of later ones."""
        return self.decoder().push(latents)

    def decoder(self) -> "WanDecoder":
        return WanDecoder(self.model, self.device)

    def _check(self, signals: Tensor) -> None:
        if signals.dtype != torch.uint8 or signals.ndim != 5 or signals.shape[-1] != 3 or signals.shape[1] == 0:
            raise ValueError(
                f"video must be uint8 (frames, height, width, 3) with at least one frame; got {signals.dtype} "
                f"{tuple(signals.shape[1:])}"
            )
        height, width = signals.shape[2:4]
        block = self.config.block
        if height % block or width % block or 0 in (height, width):
            raise ValueError(f"frames of {width}x{height} pixels: scale or crop both edges to multiples of {block}")


class WanDecoder:
    """Frames of latents pushed in any portions, one latent at a time over the causal cache of features."""

    def __init__(self, model: Any, device: torch.device) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._model, self._device = model, device
        self._cache: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in model.decoder.modules())
        self._begun = False
        self._nothing = torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def push(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """All frames of ``latents``: one of the first ever pushed, four of each later one."""
        frames = torch.cat([self._one(z) for z in latents]) if len(latents) else self._nothing
        self._nothing = frames[:0]
        return frames

    def flush(self) -> UInt8[Tensor, "f H W 3"]:
        """No frames."""
        return self._nothing

    @torch.inference_mode()
    def _one(self, latent: Float[Tensor, "C h w"]) -> UInt8[Tensor, "f H W 3"]:
        z = latent[None, :, None].to(self._device, self._model.dtype)
        x = self._model.decoder(
            self._model.post_quant_conv(z), feat_cache=self._cache, feat_idx=[0], first_chunk=not self._begun
        )
        self._begun = True
        edge = self._model.config.patch_size or 1
        pixels = rearrange(x[0].float(), "(r q p) f h w -> f (h p) (w q) r", p=edge, q=edge)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8).cpu()
