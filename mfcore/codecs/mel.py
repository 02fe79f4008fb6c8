"""Embedded audio codec: a truncated cosine transform of log-mel blocks, decoded by phase reconstruction.

No weights and no download. Letters: n latents, C kept coefficients (latent channels), g frames of a latent, m mel
bands, F frequency bins, H hop, b batch.

Latent i describes the samples [i g H, (i + 1) g H): its g frames are centered at (i g + j + 1/2) H.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import pad

from mfcore.codecs.base import Codec
from mfcore.codecs.dct import dct_matrix
from mfcore.codecs.phase_reconstruction import PhaseDecoder, StftFrames
from mfcore.errors import UserInputError, check_range
from mfcore.timeline import LatentClock, audio_clock

# Power of silence, added before the logarithm and subtracted after it. Power is relative to the window energy: a sine
# of amplitude 1 has about 1e2 in its band, white noise of standard deviation s has s**2.
_SILENCE = 1e-6

# The first channel is _GAIN times (mean log power of the latent - _MIDDLE): about -3 for silence, 4 for maximal volume.
# The transform is orthonormal up to this gain.
_MIDDLE = -7.0
_GAIN = 0.4

# Upper bound of the log power of generated latents, so that exp() stays finite.
_MAX_LOG_POWER = 7.0

# The order of the coefficients: cost = (q + _BREADTH) * (1 + _TIME * t), q and t the indices of the cosines over mel
# bands and over time. Stationary sound keeps detail over bands (the harmonics of a voice), changing sound the envelope
# only. Fitted by spectral convergence on speech.
_BREADTH = 3.0
_TIME = 4.0

# Richardson-Lucy steps from mel bands back to frequency bins: nonnegative, energy-preserving, sharper with each step.
_SHARPEN = 6


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Shape of the transform. Equal configurations give interchangeable latents for any ``iterations``."""

    sample_rate: int = 16000  # samples per second
    window: int = 1024  # samples of a frame
    hop: int = 256  # samples from frame to frame
    mels: int = 80  # bands from 0 to half the sample rate
    group: int = 4  # frames per latent
    channels: int = 64  # coefficients kept per latent
    iterations: int = 10  # of the phase reconstruction, decoder only

    def __post_init__(self) -> None:
        check_range("sample_rate", self.sample_rate, 1, 768_000)
        for name, most in (("window", 65536), ("hop", 65536), ("mels", 4096), ("group", 1024)):
            check_range(name, getattr(self, name), 1, most)
        check_range("iterations", self.iterations, 0, 10**4)
        if not 1 <= self.channels <= self.group * self.mels:
            raise UserInputError(f"channels={self.channels}: choose 1 to group * mels = {self.group * self.mels}")
        if self.group * self.hop < self.window - self.hop:
            raise UserInputError(
                f"a latent must be as long as the overlap of its windows: raise group or hop; got {self}"
            )

    @property
    def samples(self) -> int:
        """Samples per latent."""
        return self.group * self.hop


class MelCodec(Codec):
    """Latents ``(n, C)`` float32 of mono sound; the last one is padded with silence.

    The truncation preserves the level of every frame by a correction of its mean. Decoding preserves magnitudes, not
    phases: the result sounds the same, but its waveform differs.
    """

    def __init__(self, config: MelConfig | None = None) -> None:
        self.config = c = config or MelConfig()
        self.id = f"mel-v1/r{c.sample_rate}/w{c.window}/h{c.hop}/m{c.mels}/g{c.group}/c{c.channels}"
        self.channels = c.channels
        self._frames = StftFrames(window=c.window, hop=c.hop)
        bank = torch.from_numpy(mel_filterbank(c.sample_rate, c.window, c.mels)).float()
        self._width = bank.sum(1)  # bins per band, weighted
        self._bank = bank / self._width[:, None]  # band power = weighted mean of bin powers
        self._spread = bank / bank.sum(0).clamp(min=1e-6)  # bin power from band powers; columns sum to 1
        self._basis = _basis(c)
        self._gain = _GAIN / (c.group * c.mels) ** 0.5
        self._energy = float(self._frames.taper(torch.device("cpu")).square().sum())

    @property
    def clock(self) -> LatentClock:
        """Rate and offset of the latents."""
        return audio_clock(self.config.sample_rate, self.config.samples)

    def encode(self, signal: Float[Tensor, " samples"]) -> Float[Tensor, "n C"]:
        """Return ``ceil(samples / (group * hop))`` latents. Raises ValueError for a wrong type or no sample."""
        if signal.ndim != 1 or not signal.is_floating_point() or len(signal) == 0:
            raise ValueError(
                f"sound must be mono float (samples,), not empty; got {signal.dtype} {tuple(signal.shape)}"
            )
        power = self._band_power(signal.float())
        latents = self._project(torch.log(power + _SILENCE) - _MIDDLE)
        # Truncation lowers the mean of logarithms; restore the energy of every frame.
        lost = torch.log(self._loudness(power) / self._loudness(self._to_power(latents)))
        return latents + self._project(lost[..., None].expand_as(power))

    def decode(self, latents: Float[Tensor, "n C"]) -> Float[Tensor, " samples"]:
        """Return ``n * group * hop`` samples in [-1, 1], equal to the output of :meth:`decoder`."""
        return self.decode_batch(latents[None])[0]

    def decode_batch(self, latents: Float[Tensor, "b n C"]) -> Float[Tensor, "b samples"]:
        """Return the samples of clips of equal length; much faster than one by one."""
        decoder = MelDecoder(self)
        return torch.cat([decoder.push_batch(latents), decoder.flush_batch()], dim=1)

    def decoder(self) -> "MelDecoder":
        """Return a new streaming decoder."""
        return MelDecoder(self)

    def magnitudes(self, latents: Float[Tensor, "b C"]) -> Float[Tensor, "b g F"]:
        """Return the magnitudes of the short-time spectra, independent of the batch size.

        Computed in float64: in quiet bands, the difference to silence cancels. float32 products, which some processors
        round differently for other batch sizes, would then differ by a hundredth, and so would the phases.
        """
        bands = self._to_power(latents.double())
        spread, bank = self._spread.to(bands), self._bank.T.to(bands)
        power = bands @ spread
        for _ in range(_SHARPEN):
            power = power * ((bands / (power @ bank).clamp(min=1e-12)) @ spread)
        return (power * self._energy).sqrt().float()

    def phases(self) -> PhaseDecoder:
        """Return a new phase decoder."""
        return PhaseDecoder(self._frames, self.config.iterations)

    def _band_power(self, signal: Float[Tensor, " samples"]) -> Float[Tensor, "n g m"]:
        whole = pad(signal[None], (0, -len(signal) % self.config.samples))
        margin = self._frames.overlap // 2
        spectra = self._frames.analyze(pad(whole, (margin, margin), mode="reflect"))[0]
        power = spectra.abs().square() / self._energy
        return rearrange(power @ self._bank.T.to(power.device), "(n g) m -> n g m", g=self.config.group)

    def _loudness(self, power: Float[Tensor, "n g m"]) -> Float[Tensor, "n g"]:
        """Return the energy of frames, including silence."""
        return (power + _SILENCE) @ self._width.to(power.device)

    def _project(self, log_power: Float[Tensor, "n g m"]) -> Float[Tensor, "n C"]:
        return rearrange(log_power, "n g m -> n (g m)") @ self._basis.T.to(log_power.device) * self._gain

    def _to_power(self, latents: Float[Tensor, "n C"]) -> Float[Tensor, "n g m"]:
        log_power = latents @ self._basis.to(latents) / self._gain + _MIDDLE
        power = log_power.clamp(max=_MAX_LOG_POWER).exp() - _SILENCE
        return rearrange(power.clamp(min=0), "n (g m) -> n g m", g=self.config.group)


class MelDecoder:
    """Streaming decoder with a delay of one latent: the phases depend on the next one."""

    def __init__(self, codec: MelCodec) -> None:
        self._codec, self._phases = codec, codec.phases()

    def push(self, latents: Float[Tensor, "n C"]) -> Float[Tensor, " samples"]:
        """Return the samples that are final."""
        return self.push_batch(latents[None])[0]

    def flush(self) -> Float[Tensor, " samples"]:
        """Return the rest of the samples."""
        return self.flush_batch()[0]

    def state(self) -> dict[str, Tensor]:
        """Return magnitudes, spectra and windows that the next samples depend on."""
        return self._phases.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._phases.load_state(state)

    def push_batch(self, latents: Float[Tensor, "b n C"]) -> Float[Tensor, "b samples"]:
        """Return the samples of several clips that are final."""
        # One latent at a time: equal operations on equal shapes give bit-equal results for any split.
        sound = [self._phases.push(self._codec.magnitudes(latents[:, i])) for i in range(latents.shape[1])]
        return torch.cat([latents.new_zeros(len(latents), 0), *sound], dim=1).clamp(-1, 1)

    def flush_batch(self) -> Float[Tensor, "b samples"]:
        """Return the rest of the samples of several clips."""
        return self._phases.flush().clamp(-1, 1)


def mel_filterbank(sample_rate: int, window: int, mels: int) -> Float64[np.ndarray, "m F"]:
    """Return triangles of height 1, evenly spaced on the HTK mel scale, 2595 log10(1 + f / 700), up to Nyquist."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    low = corners[:-2, None]
    peak = corners[1:-1, None]
    high = corners[2:, None]
    bins = np.linspace(0, sample_rate / 2, window // 2 + 1)
    bank = np.maximum(0, np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)))
    if (bank.sum(1) == 0).any():
        raise UserInputError(
            f"{mels} mel bands are too many for a window of {window} samples. Lower mels or raise window"
        )
    return bank


def _basis(config: MelConfig) -> Float[Tensor, "C gm"]:
    """Return the kept orthonormal cosines over (time, band) as rows, by increasing cost."""
    t, q = np.indices((config.group, config.mels)).reshape(2, -1)
    kept = np.argsort((q + _BREADTH) * (1 + _TIME * t), kind="stable")[: config.channels]
    rows = np.einsum("ct,cm->ctm", dct_matrix(config.group)[t[kept]], dct_matrix(config.mels)[q[kept]])
    return torch.from_numpy(rearrange(rows, "c t m -> c (t m)")).float()
