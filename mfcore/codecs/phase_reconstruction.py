"""Sound from spectrogram magnitudes, block by block: real-time iterative inversion with look-ahead.

After Zhu, Beauregard and Wyse, "Real-time signal estimation from modified short-time Fourier transform magnitude
spectra" (IEEE TASLP 2007), with blocks of frames instead of single frames, and the momentum of Perraudin, Balazs and
Sondergaard, "A fast Griffin-Lim algorithm" (WASPAA 2013). Committed samples never change, so the result does not depend
on how the magnitudes are split. The algorithm is deterministic.

Letters: b batch, k frames, F frequency bins, N window length, H hop, M = (N - H) / 2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

_MOMENTUM = 0.99
_NO_PHASE = 1e-12  # a spectrum value below this has no phase
_IMPULSE_RISE = 0.5  # minimal change of the log magnitude over two hops at an impulse
_ONSET = 0.6  # maximal share of the magnitude at an impulse that earlier sound explains
_GAUSSIAN_VARIANCE = 0.03  # of the Gaussian that approximates a Hann window of length 1; best for clicks
_MIN_WEIGHT = 0.1  # lower bound of the weight at the ends of a clip, where the taper falls to 0


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
        """Return the Hann window."""
        return _hann(self.window, device)

    def analyze(self, signal: Float[Tensor, "b samples"]) -> Complex[Tensor, "b k F"]:
        """Return the spectra of the windows that fit into ``signal``, from its first sample on."""
        return torch.fft.rfft(signal.unfold(-1, self.window, self.hop) * self.taper(signal.device))

    def overlap_add(self, windows: Float[Tensor, "b k N"]) -> Float[Tensor, "b samples"]:
        """Return the sum of windows at distance H; (k - 1) H + N samples."""
        k = windows.shape[1]
        total = windows.new_zeros(len(windows), k * self.hop + self.overlap)
        for j, piece in enumerate(rearrange(windows, "b k (j h) -> j b (k h)", h=self.hop)):
            total[:, j * self.hop : (j + k) * self.hop] += piece
        return total

    def synthesize(self, spectra: Complex[Tensor, "b k F"]) -> Float[Tensor, "b samples"]:
        """Return the overlap-add of tapered windows, not divided by :meth:`weight`."""
        return self.overlap_add(torch.fft.irfft(spectra, n=self.window) * self.taper(spectra.device))

    def weight(self, k: int, device: torch.device) -> Float[Tensor, " samples"]:
        """Return the sum of the squared tapers of k windows."""
        return self.overlap_add(self.taper(device).square().expand(1, k, -1))[0]


@lru_cache(maxsize=8)
def _hann(window: int, device: torch.device) -> Float[Tensor, " N"]:
    return torch.hann_window(window, dtype=torch.float32, device=device)


class PhaseDecoder:
    """Streaming decoder from blocks of magnitudes to sound, with a delay of one block.

    The signal before and after the clip counts as unknown, not as silence: at the ends, only existing windows have a
    weight, so the level is correct up to the first and last sample.
    """

    def __init__(self, frames: StftFrames, iterations: int) -> None:
        self._frames, self._iterations = frames, iterations
        self._waiting: Float[Tensor, "b block F"] | None = None  # magnitudes of the next block to commit
        self._lookahead: Complex[Tensor, "b k F"] | None = None  # its spectra from the previous iteration
        self._tail: Float[Tensor, "b 2M"] | None = None  # committed windows that overlap it, and their weight
        self._tail_weight: Float[Tensor, " 2M"] | None = None

    def push(self, magnitudes: Float[Tensor, "b block F"]) -> Float[Tensor, "b samples"]:
        """Return the samples that are final. Blocks have one size of at least N - H samples."""
        waiting, self._waiting = self._waiting, magnitudes
        if waiting is None:
            return magnitudes.new_zeros(len(magnitudes), 0)
        return self._commit(torch.cat([waiting, magnitudes], dim=1), block=waiting.shape[1])

    def flush(self) -> Float[Tensor, "b samples"]:
        """Return the last block, and the M samples of its windows beyond it."""
        if self._waiting is None:
            return torch.zeros(1, 0)
        sound = self._commit(self._waiting, block=self._waiting.shape[1])
        assert self._tail is not None
        assert self._tail_weight is not None
        rest = _divide(self._tail, self._tail_weight)[:, : self._frames.overlap // 2]
        self._waiting = None
        return torch.cat([sound, rest], dim=1)

    def state(self) -> dict[str, Tensor]:
        """Return the magnitudes, spectra and windows that the next samples depend on; empty before the first block."""
        parts = {
            "waiting": self._waiting,
            "lookahead": self._lookahead,
            "tail": self._tail,
            "weight": self._tail_weight,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._waiting, self._lookahead = state.get("waiting"), state.get("lookahead")
        self._tail, self._tail_weight = state.get("tail"), state.get("weight")

    def _commit(self, magnitudes: Float[Tensor, "b k F"], block: int) -> Float[Tensor, "b samples"]:
        """Commit the first ``block`` frames; the other frames only improve their phases."""
        frames, is_first = self._frames, self._tail is None
        spectra = self._iterate(magnitudes)
        sound = self._with_tail(frames.synthesize(spectra[:, :block]))
        weight = self._with_tail_weight(frames.weight(block, magnitudes.device))
        step = block * frames.hop
        self._lookahead = spectra[:, block:]
        self._tail, self._tail_weight = sound[:, step:], weight[step:]
        return _divide(sound, weight)[:, frames.overlap // 2 if is_first else 0 : step]

    def _iterate(self, magnitudes: Float[Tensor, "b k F"]) -> Complex[Tensor, "b k F"]:
        """Return spectra of the given magnitudes with phases consistent with the committed sound."""
        weight = self._with_tail_weight(self._frames.weight(magnitudes.shape[1], magnitudes.device))

        def project(spectra: Tensor) -> Tensor:
            """Return the spectra of the least-squares signal of ``spectra``."""
            return self._frames.analyze(_divide(self._with_tail(self._frames.synthesize(spectra)), weight))

        spectra = self._start(magnitudes, project)
        previous = None
        for _ in range(self._iterations):
            current = project(spectra)
            moved = current if previous is None else current + _MOMENTUM * (current - previous)
            spectra, previous = _with_phase_of(moved, magnitudes), current
        return spectra

    def _start(
        self, magnitudes: Float[Tensor, "b k F"], project: Callable[[Tensor], Tensor]
    ) -> Complex[Tensor, "b k F"]:
        """Return initial spectra: known frames from the look-ahead, new ones from overlapping sound or as a start."""
        known = magnitudes[:, :0] + 0j if self._lookahead is None else self._lookahead
        new = magnitudes.shape[1] - known.shape[1]
        if new == 0:
            return known
        continued = project(pad(known, (0, 0, 0, new)))
        start = _initial_spectra(continued, magnitudes, self._frames)
        return torch.cat([known, _with_phase_of(start, magnitudes)[:, -new:]], dim=1)

    def _with_tail(self, sound: Float[Tensor, "b samples"]) -> Float[Tensor, "b samples"]:
        if self._tail is not None:
            sound[:, : self._frames.overlap] += self._tail
        return sound

    def _with_tail_weight(self, weight: Float[Tensor, " samples"]) -> Float[Tensor, " samples"]:
        if self._tail_weight is not None:
            weight[: self._frames.overlap] += self._tail_weight
        return weight


def _initial_spectra(
    continued: Complex[Tensor, "b k F"], magnitudes: Float[Tensor, "b k F"], frames: StftFrames
) -> Complex[Tensor, "b k F"]:
    """Return ``continued`` where it explains the magnitudes, impulse phases where they rise, else noise phases.

    Under a Gaussian window of variance s2, an impulse at distance d from the middle has d = s2 * d log|X| / dt at every
    frequency. Its phase is minus the integral of the delay over frequency (Prusa, Balazs, Sondergaard 2017). Impulses
    everywhere would turn a hiss into a buzz.
    """
    log = torch.log(magnitudes.clamp(min=1e-6))
    rise = torch.cat([log[:, 1:], log[:, -1:]], dim=1) - torch.cat([log[:, :1], log[:, :-1]], dim=1)
    middle = frames.window / 2
    delay = middle + (_GAUSSIAN_VARIANCE * frames.window**2 * rise / (2 * frames.hop)).clamp(-middle, middle)
    impulse = torch.polar(magnitudes, -2 * torch.pi / frames.window * (delay.cumsum(-1) - delay))
    size = _magnitude(continued)
    start = torch.where(size > _NO_PHASE, continued, _noise(magnitudes))
    return torch.where((rise.abs() > _IMPULSE_RISE) & (size < _ONSET * magnitudes), impulse, start)


def _noise(like: Float[Tensor, "b k F"]) -> Complex[Tensor, "k F"]:
    """Return fixed random phases."""
    turns = torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(like.device)


def _divide(sound: Float[Tensor, "b samples"], weight: Float[Tensor, " samples"]) -> Float[Tensor, "b samples"]:
    return sound / weight.clamp(min=_MIN_WEIGHT)


def _with_phase_of(spectra: Complex[Tensor, "b k F"], magnitudes: Float[Tensor, "b k F"]) -> Complex[Tensor, "b k F"]:
    return spectra * (magnitudes / _magnitude(spectra).clamp(min=_NO_PHASE))


def _magnitude(spectra: Complex[Tensor, "b k F"]) -> Float[Tensor, "b k F"]:
    """Return absolute values; ``abs`` guards against overflow and takes five times as long."""
    return torch.sqrt(spectra.real.square() + spectra.imag.square())
