"""Sound from spectrogram magnitudes, block by block: real-time iterative inversion with look-ahead.

After Zhu, Beauregard and Wyse, "Real-time signal estimation from modified short-time Fourier transform magnitude
spectra" (IEEE TASLP 2007), with blocks of frames in place of single ones and the momentum of Perraudin, Balazs and
Sondergaard, "A fast Griffin-Lim algorithm" (WASPAA 2013). What is committed never changes, so the sound cannot depend
on the portions in which the magnitudes arrive. Nothing in it is random.

Letters: b batch, k frames at work, F frequency bins, N window length, H hop, M = (N - H) / 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

_MOMENTUM = 0.99
_NO_PHASE = 1e-12  # a spectrum value below this has no phase
_RISE = 0.5  # a pulse changes the log magnitude by more than this over two hops,
_ONSET = 0.6  # and the sound before it explains less than this share of the magnitude
_WIDTH = 0.03  # variance of the Gaussian that stands for a Hann window of length 1; the value that places clicks best
_THIN = 0.1  # at the outer ends of a clip a single taper falls to 0; its square is not divided by below this


@dataclass(frozen=True, kw_only=True)
class StftFrames:
    """Short-time frames under a Hann window: frame j covers the samples [j H - M, j H - M + N)."""

    window: int  # N, samples
    hop: int  # H, samples

    def __post_init__(self) -> None:
        if self.hop < 2 or self.hop % 2 or self.window < self.hop or self.window % (2 * self.hop):
            raise ValueError(f"the hop must be even and the window an even multiple of it; got {self}")

    @property
    def overlap(self) -> int:
        """Samples that a window shares with later ones, 2 M."""
        return self.window - self.hop

    def taper(self, device: torch.device) -> Float[Tensor, " N"]:
        return _hann(self.window, device)

    def analyze(self, signal: Float[Tensor, "b samples"]) -> Complex[Tensor, "b k F"]:
        """Spectra of the windows that fit into ``signal``; the first one begins at its first sample."""
        return torch.fft.rfft(signal.unfold(-1, self.window, self.hop) * self.taper(signal.device))

    def overlap_add(self, windows: Float[Tensor, "b k N"]) -> Float[Tensor, "b samples"]:
        """Sum of windows laid H apart; (k - 1) H + N samples."""
        k = windows.shape[1]
        total = windows.new_zeros(len(windows), k * self.hop + self.overlap)
        for j, piece in enumerate(rearrange(windows, "b k (j h) -> j b (k h)", h=self.hop)):
            total[:, j * self.hop : (j + k) * self.hop] += piece
        return total

    def synthesize(self, spectra: Complex[Tensor, "b k F"]) -> Float[Tensor, "b samples"]:
        """Overlapped tapered windows, still to be divided by :meth:`weight`."""
        return self.overlap_add(torch.fft.irfft(spectra, n=self.window) * self.taper(spectra.device))

    def weight(self, k: int, device: torch.device) -> Float[Tensor, " samples"]:
        """Sum of the squared tapers of k windows."""
        return self.overlap_add(self.taper(device).square().expand(1, k, -1))[0]


@lru_cache(maxsize=8)
def _hann(window: int, device: torch.device) -> Float[Tensor, " N"]:
    return torch.hann_window(window, dtype=torch.float32, device=device)


class PhaseDecoder:
    """Blocks of magnitudes in, sound out, one block late.

    The signal before and after the clip is taken as unknown, not as silence: at the ends only the windows that exist
    share the weight, so the level holds to the first and last sample.
    """

    def __init__(self, frames: StftFrames, iterations: int) -> None:
        self._frames, self._iterations = frames, iterations
        self._waiting: Float[Tensor, "b block F"] | None = None  # magnitudes of the block to be committed next
        self._foreseen: Complex[Tensor, "b k F"] | None = None  # its spectra as the look-ahead left them
        self._tail: Float[Tensor, "b 2M"] | None = None  # committed windows that reach into it, and their weight
        self._tail_weight: Float[Tensor, " 2M"] | None = None

    def push(self, magnitudes: Float[Tensor, "b block F"]) -> Float[Tensor, "b samples"]:
        """Samples that have become final. Blocks must be of one size and at least N - H samples long."""
        waiting, self._waiting = self._waiting, magnitudes
        if waiting is None:
            return magnitudes.new_zeros(len(magnitudes), 0)
        return self._commit(torch.cat([waiting, magnitudes], dim=1), block=waiting.shape[1])

    def flush(self) -> Float[Tensor, "b samples"]:
        """The last block, and the M samples that its windows reach beyond it."""
        if self._waiting is None:
            return torch.zeros(1, 0)
        sound = self._commit(self._waiting, block=self._waiting.shape[1])
        assert self._tail is not None
        assert self._tail_weight is not None
        rest = _divide(self._tail, self._tail_weight)[:, : self._frames.overlap // 2]
        self._waiting = None
        return torch.cat([sound, rest], dim=1)

    def _commit(self, magnitudes: Float[Tensor, "b k F"], block: int) -> Float[Tensor, "b samples"]:
        """Fix the first ``block`` frames for good; the others only help to find their phases."""
        frames, begins = self._frames, self._tail is None
        spectra = self._iterate(magnitudes)
        sound = self._with_tail(frames.synthesize(spectra[:, :block]))
        weight = self._with_tail_weight(frames.weight(block, magnitudes.device))
        step = block * frames.hop
        self._foreseen = spectra[:, block:]
        self._tail, self._tail_weight = sound[:, step:], weight[step:]
        return _divide(sound, weight)[:, frames.overlap // 2 if begins else 0 : step]

    def _iterate(self, magnitudes: Float[Tensor, "b k F"]) -> Complex[Tensor, "b k F"]:
        """Spectra of the given magnitudes whose phases agree best with the committed sound and with each other."""
        weight = self._with_tail_weight(self._frames.weight(magnitudes.shape[1], magnitudes.device))

        def project(spectra: Tensor) -> Tensor:
            """Spectra of the signal whose windows come nearest to ``spectra``, in least squares."""
            return self._frames.analyze(_divide(self._with_tail(self._frames.synthesize(spectra)), weight))

        spectra = self._start(magnitudes, project)
        before = None
        for _ in range(self._iterations):
            now = project(spectra)
            ahead = now if before is None else now + _MOMENTUM * (now - before)
            spectra, before = _with_phase_of(ahead, magnitudes), now
        return spectra

    def _start(
        self, magnitudes: Float[Tensor, "b k F"], project: Callable[[Tensor], Tensor]
    ) -> Complex[Tensor, "b k F"]:
        """Frames seen before: as the look-ahead left them. New ones: go on with what overlaps them, or begin anew."""
        seen = magnitudes[:, :0] + 0j if self._foreseen is None else self._foreseen
        fresh = magnitudes.shape[1] - seen.shape[1]
        if fresh == 0:
            return seen
        goes_on = project(pad(seen, (0, 0, 0, fresh)))
        start = _begin(goes_on, magnitudes, self._frames)
        return torch.cat([seen, _with_phase_of(start, magnitudes)[:, -fresh:]], dim=1)

    def _with_tail(self, sound: Float[Tensor, "b samples"]) -> Float[Tensor, "b samples"]:
        if self._tail is not None:
            sound[:, : self._frames.overlap] += self._tail
        return sound

    def _with_tail_weight(self, weight: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        if self._tail_weight is not None:
            weight[: self._frames.overlap] += self._tail_weight
        return weight


def _begin(
    goes_on: Complex[Tensor, "b k F"], magnitudes: Float[Tensor, "b k F"], frames: StftFrames
) -> Complex[Tensor, "b k F"]:
    """``goes_on`` where it explains the magnitudes; the phases of a pulse where they rise; noise where neither holds.

    Under a Gaussian window of variance s2 a pulse at distance d from the middle has d = s2 * d log|X| / dt at every
    frequency, and the phase is minus the integral of the delay over frequency (Prusa, Balazs, Sondergaard 2017). Pulses
    everywhere would turn a hiss into a buzz.
    """
    log = torch.log(magnitudes.clamp(min=1e-6))
    rise = torch.cat([log[:, 1:], log[:, -1:]], dim=1) - torch.cat([log[:, :1], log[:, :-1]], dim=1)
    middle = frames.window / 2
    delay = middle + (_WIDTH * frames.window**2 * rise / (2 * frames.hop)).clamp(-middle, middle)
    pulse = torch.polar(magnitudes, -2 * torch.pi / frames.window * (delay.cumsum(-1) - delay))
    size = _size(goes_on)
    start = torch.where(size > _NO_PHASE, goes_on, _noise(magnitudes))
    return torch.where((rise.abs() > _RISE) & (size < _ONSET * magnitudes), pulse, start)


def _noise(like: Float[Tensor, "b k F"]) -> Complex[Tensor, "k F"]:
    """Phases of a hiss, always the same ones."""
    turns = torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(like.device)


def _divide(sound: Float[Tensor, "b samples"], weight: Float[Tensor, " samples"]) -> Float[Tensor, "b samples"]:
    return sound / weight.clamp(min=_THIN)


def _with_phase_of(spectra: Complex[Tensor, "b k F"], magnitudes: Float[Tensor, "b k F"]) -> Complex[Tensor, "b k F"]:
    return spectra * (magnitudes / _size(spectra).clamp(min=_NO_PHASE))


def _size(spectra: Complex[Tensor, "b k F"]) -> Float[Tensor, "b k F"]:
    """Absolute values; torch's own guard against overflow at five times the time."""
    return torch.sqrt(spectra.real.square() + spectra.imag.square())
