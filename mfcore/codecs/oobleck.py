"""Stable Audio's Oobleck autoencoder through diffusers, from a local folder: 64 channels, 44100 / 2048 Hz.

Letters: b batch, n latents, C latent channels, S samples of a latent.

Latent i describes the samples [i S, (i + 1) S). Audio is mono: both channels of a stereo model get the same input, and
decoding takes their mean. The samples of a latent depend on some latents before and after it (:func:`receptive_field`),
so streaming has a delay of that many latents and keeps that many as context. The model runs in float32: the rounding of
bfloat16 is noise at -50 dB in a waveform.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mfcore.codecs.base import Codec
from mfcore.codecs.pretrained import compute_device, locate_weights, model_folder, read_config, weights_digest
from mfcore.errors import UserInputError
from mfcore.timeline import LatentClock, audio_clock

_CLASS = "AutoencoderOobleck"


@dataclass(frozen=True, kw_only=True)
class OobleckConfig:
    """Weights and latent format; see :func:`oobleck_config_from_folder`."""

    channels: int
    sample_rate: int  # samples per second
    hop: int  # samples per latent
    weights: str  # digest of configuration and tensors
    folder: str = ""  # last known folder of the weights; does not change the latents


def oobleck_config_from_folder(folder: str) -> OobleckConfig:
    """Return the configuration of the autoencoder in ``folder`` or its ``vae/``. Raises ValueError without one."""
    path = model_folder(folder, "vae", (_CLASS,), "Stable Audio autoencoder (diffusers AutoencoderOobleck)")
    model_config = read_config(path / "config.json")
    ratios = model_config.get("downsampling_ratios", (2, 4, 4, 8, 8))
    if any(ratio % 2 for ratio in ratios):
        raise UserInputError(f"{path} has odd strides {ratios}: use a model with even strides")
    return OobleckConfig(
        channels=int(model_config.get("decoder_input_channels", 64)),
        sample_rate=int(model_config.get("sampling_rate", 44100)),
        hop=prod(ratios),
        weights=weights_digest(path),
        folder=folder,
    )


def receptive_field(ratios: Sequence[int]) -> tuple[int, int]:
    """Return how many latents before and after latent i its S samples depend on, for these upsampling ratios.

    Computed from the samples back to the latents: a convolution of k taps, dilation d and padding p reads [first - p,
    last + d (k - 1) - p] of its input; a transposed one of 2 s taps, stride s and padding s / 2 reads
    ceil((first + s / 2 - 2 s + 1) / s) to floor((last + s / 2) / s).
    """
    first, last = 0, prod(ratios) - 1
    first, last = first - 3, last + 3  # the output convolution: 7 taps
    for stride in reversed(ratios):
        residual = 3 * (1 + 3 + 9)  # three residual units: 7 taps at dilations 1, 3 and 9
        first, last = first - residual, last + residual
        first, last = ceil((first + stride // 2 - 2 * stride + 1) / stride), floor((last + stride // 2) / stride)
    return 3 - first, last + 3  # the input convolution: 7 taps


class OobleckCodec(Codec):
    """Latents ``(n, C)`` float32 of mono sound, the posterior mean; the last one is padded with silence.

    The weights are loaded at first use.
    """

    def __init__(self, config: OobleckConfig, device: torch.device | str | None = None) -> None:
        self.config = c = config
        self.id = f"oobleck-v1/c{c.channels}/r{c.sample_rate}/h{c.hop}/{c.weights}"
        self.channels = c.channels
        self.device = compute_device(device)

    @property
    def clock(self) -> LatentClock:
        """Rate and offset of the latents."""
        return audio_clock(self.config.sample_rate, self.config.hop)

    @cached_property
    def model(self) -> Any:
        """AutoencoderOobleck of diffusers on the device. Raises ValueError if it is not found."""
        from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

        folder = locate_weights(
            self.config.weights, self.config.folder, lambda f: oobleck_config_from_folder(f).weights, self.id
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers uses the deprecated weight_norm
            model: Any = AutoencoderOobleck.from_pretrained(
                model_folder(folder, "vae", (_CLASS,), "Stable Audio autoencoder"),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        return model.to(self.device).eval().requires_grad_(False)

    def load(self) -> None:
        """Load the weights. Raises ValueError if they are not found."""
        assert self.model

    def encode(self, signal: Float[Tensor, " samples"]) -> Float[Tensor, "n C"]:
        """Return ``ceil(samples / hop)`` latents. Raises ValueError for a wrong type or no sample."""
        return self.encode_batch(signal[None])[0]

    def encode_batch(self, signals: Float[Tensor, "b samples"]) -> Float[Tensor, "b n C"]:
        """Return the latents of clips of equal length."""
        if signals.ndim != 2 or not signals.is_floating_point() or signals.shape[1] == 0:
            raise ValueError(
                f"sound must be mono float (samples,), not empty; got {signals.dtype} {tuple(signals.shape[1:])}"
            )
        whole = pad(signals.float(), (0, -signals.shape[1] % self.config.hop)).to(self.device)
        channels = int(self.model.config.audio_channels)
        with torch.inference_mode():
            posterior = self.model.encode(whole[:, None].expand(-1, channels, -1), return_dict=False)[0]
            latents: Tensor = posterior.mode()
        return latents.transpose(1, 2).float().cpu().clone()

    def decode(self, latents: Float[Tensor, "n C"]) -> Float[Tensor, " samples"]:
        """Return ``n * hop`` samples in [-1, 1], equal to the output of :meth:`decoder` up to rounding."""
        decoder = self.decoder()
        return torch.cat([decoder.push(latents), decoder.flush()])

    def decoder(self) -> "OobleckDecoder":
        """Return a new streaming decoder."""
        return OobleckDecoder(self.model, self.device, self.config.hop)


class OobleckDecoder:
    """Streaming decoder; its delay is the look-ahead of the model."""

    def __init__(self, model: Any, device: torch.device, hop: int) -> None:
        self._model, self._device = model, device
        self._hop = hop
        self._before, self._after = receptive_field(model.config.downsampling_ratios[::-1])
        self._kept: Tensor = torch.zeros(
            0, model.config.decoder_input_channels
        )  # context, then latents that are not decoded yet
        self._context = 0  # latents at the start of _kept that are decoded

    def push(self, latents: Float[Tensor, "n C"]) -> Float[Tensor, " samples"]:
        """Return the samples of all latents with enough look-ahead."""
        self._kept = torch.cat([self._kept, latents.float().cpu()])
        return self._decode_until(len(self._kept) - self._after)

    def flush(self) -> Float[Tensor, " samples"]:
        """Return the rest of the samples."""
        return self._decode_until(len(self._kept))

    def state(self) -> dict[str, Tensor]:
        """Return the latents of the context and those that are not decoded yet."""
        return {"kept": self._kept, "context": torch.tensor(self._context)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._kept, self._context = state["kept"], int(state["context"])

    @torch.inference_mode()
    def _decode_until(self, until: int) -> Float[Tensor, " samples"]:
        """Return the samples of the latents from the context to ``until``, an index into _kept."""
        if until <= self._context:
            return torch.zeros(0)
        waveform: Tensor = self._model.decode(self._kept.T[None].to(self._device), return_dict=False)[0]
        sound = waveform[0].mean(0)[self._context * self._hop : until * self._hop].clamp(-1, 1).cpu()
        spare = max(0, until - self._before)
        self._kept, self._context = self._kept[spare:], until - spare
        return sound.clone()
