"""Causal video autoencoder of Wan through diffusers, from a local folder.

Wan 2.1 has 16 channels and blocks of 8 x 8 x 4, Wan 2.2 has 48 channels and blocks of 16 x 16 x 4.

Letters: b batch, f frames, n latents, C latent channels, h w latent height and width, p block edge in pixels.

The first latent is the first frame, each later latent describes four frames. All earlier latents are visible through a
feature cache, so decoding latent by latent with that cache is bit-equal to decoding the whole.
"""

from collections.abc import Mapping
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
from mfcore.errors import UserInputError
from mfcore.timeline import LatentClock, video_clock

_CLASS = "AutoencoderKLWan"
_GROUP = 4  # frames per latent after the first, fixed in diffusers


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Weights and latent format; see :func:`wan_config_from_folder`."""

    channels: int
    block: int  # block edge, pixels
    weights: str  # digest of configuration and tensors
    group: int = _GROUP
    fps: Fraction = Fraction(24)  # frames per second; does not change the latents, only their clock
    folder: str = ""  # last known folder of the weights; does not change the latents

    def __post_init__(self) -> None:
        if self.fps <= 0 or self.group != _GROUP or min(self.channels, self.block) < 1:
            raise UserInputError(f"Wan needs positive fps, channels and block, and group={_GROUP}; got {self}")


def wan_config_from_folder(folder: str, fps: Fraction = Fraction(24)) -> WanConfig:
    """Return the configuration of the autoencoder in ``folder`` or its ``vae/``. Raises ValueError without one."""
    path = model_folder(folder, "vae", (_CLASS,), "Wan autoencoder (diffusers AutoencoderKLWan)")
    model_config = read_config(path / "config.json")
    temporal = 2 ** sum(model_config.get("temperal_downsample", (False, True, True)))
    if temporal != _GROUP:
        raise UserInputError(f"{path} has {temporal} frames per latent: use a Wan autoencoder with {_GROUP}")
    return WanConfig(
        channels=int(model_config.get("z_dim", 16)),
        block=2 ** (len(model_config.get("dim_mult", (1, 2, 4, 4))) - 1) * int(model_config.get("patch_size") or 1),
        weights=weights_digest(path),
        fps=fps,
        folder=folder,
    )


class WanCodec(Codec):
    """Latents ``(1 + n, C, H / block, W / block)`` float32 of ``1 + 4 n`` frames: the posterior mean, not whitened.

    Frames after the first that do not fill a group of four are dropped. The weights are loaded at first use.
    """

    def __init__(self, config: WanConfig, device: torch.device | str | None = None) -> None:
        self.config = c = config
        self.id = f"wan-v1/c{c.channels}/b{c.block}/g{c.group}/{c.weights}"
        self.channels = self.static_channels = c.channels  # all latents have the same channels
        self.device = compute_device(device)

    @property
    def clock(self) -> LatentClock:
        """Rate and offset of the latents."""
        return video_clock(Fraction(self.config.fps), self.config.group)

    @property
    def published_stats(self) -> LatentStats:
        """Mean and standard deviation per channel, from the configuration of the model."""
        config = read_config(self._folder / "config.json")
        mean, std = tuple(map(float, config["latents_mean"])), tuple(map(float, config["latents_std"]))
        return LatentStats(mean=mean, std=std, head_mean=mean, head_std=std)

    @cached_property
    def _folder(self) -> Path:
        folder = locate_weights(
            self.config.weights, self.config.folder, lambda f: wan_config_from_folder(f).weights, self.id
        )
        return model_folder(folder, "vae", (_CLASS,), "Wan autoencoder")

    @cached_property
    def model(self) -> Any:
        """AutoencoderKLWan of diffusers on the device, in float32. Raises ValueError if it is not found."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        model: Any = AutoencoderKLWan.from_pretrained(
            self._folder,
            torch_dtype=torch.float32,  # latents are computed once and stored
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
        return model.to(self.device).eval().requires_grad_(False)

    def load(self) -> None:
        """Load the weights. Raises ValueError if they are not found."""
        assert self.model

    def encode(self, signal: UInt8[Tensor, "f H W 3"]) -> Float[Tensor, "n C h w"]:
        """Return the latents of RGB frames. Raises ValueError for a wrong type, no frame, or a wrong frame size."""
        return self.encode_batch(signal[None])[0]

    def encode_batch(self, signals: UInt8[Tensor, "b f H W 3"]) -> Float[Tensor, "b n C h w"]:
        """Return the latents of clips of equal length."""
        self._check(signals)
        frames = 1 + (signals.shape[1] - 1) // _GROUP * _GROUP
        pixels = rearrange(signals[:, :frames].to(self.device), "b f h w r -> b r f h w")
        with torch.inference_mode():
            posterior = self.model.encode(pixels.to(self.model.dtype) / 127.5 - 1, return_dict=False)[0]
            latents: Tensor = posterior.mode()
        return rearrange(latents.float().cpu(), "b c n h w -> b n c h w").clone()

    def decode(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """Return the RGB frames of the first-frame latent and any number of later ones."""
        return self.decoder().push(latents)

    def decoder(self) -> "WanDecoder":
        """Return a new streaming decoder."""
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
            raise UserInputError(f"frame size {width}x{height}: scale or crop both edges to multiples of {block}")


class WanDecoder:
    """Streaming decoder: one latent at a time over the causal feature cache, in bfloat16 on a GPU."""

    def __init__(self, model: Any, device: torch.device) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._model, self._device = model, device
        self._cache: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in model.decoder.modules())
        self._started = False
        self._empty = torch.empty(0, 0, 0, 3, dtype=torch.uint8)

    def push(self, latents: Float[Tensor, "n C h w"]) -> UInt8[Tensor, "f H W 3"]:
        """Return all frames of ``latents``: one for the first latent of the clip, four for each later one."""
        frames = torch.cat([self._decode_latent(z) for z in latents]) if len(latents) else self._empty
        self._empty = frames[:0]
        return frames

    def flush(self) -> UInt8[Tensor, "f H W 3"]:
        """Return no frames."""
        return self._empty

    def state(self) -> dict[str, Tensor]:
        """Return the feature cache. An entry is absent, a tensor, or the mark of diffusers for a repeated frame."""
        found = {"started": torch.tensor(self._started), "empty": self._empty}
        for i, entry in enumerate(self._cache):
            if entry is not None:
                found[f"cache.{i}"] = entry if isinstance(entry, Tensor) else torch.empty(0)
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._started, self._empty = bool(state["started"]), state["empty"]
        for i in range(len(self._cache)):
            entry = state.get(f"cache.{i}")
            self._cache[i] = None if entry is None else entry.to(self._device) if entry.numel() else "Rep"

    @torch.inference_mode()
    def _decode_latent(self, latent: Float[Tensor, "C h w"]) -> UInt8[Tensor, "f H W 3"]:
        z = latent[None, :, None].to(self._device, self._model.dtype)
        dtype = compute_dtype(self._device)
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            x = self._model.decoder(
                self._model.post_quant_conv(z), feat_cache=self._cache, feat_idx=[0], first_chunk=not self._started
            )
        self._started = True
        edge = self._model.config.patch_size or 1
        pixels = rearrange(x[0].float(), "(r q p) f h w -> f (h p) (w q) r", p=edge, q=edge)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round_().to(torch.uint8).cpu()
