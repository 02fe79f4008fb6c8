"""What a codec promises: signal to latents, latents back to signal, the second one also piece by piece."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.timeline import LatentClock


class StreamDecoder(Protocol):
    """Latents in, signal out, in any portions: the concatenation of all outputs never depends on the portions."""

    def push(self, latents: Float[Tensor, "n C *space"]) -> Tensor:
        """Signal that has become final (may be empty: some decoders look ahead)."""
        ...

    def flush(self) -> Tensor:
        """The rest of the signal; the decoder is used up."""
        ...


class Codec(Protocol):
    """One modality's codec.

    Video signals are uint8 ``(frames, height, width, 3)`` RGB; audio float32 ``(samples,)`` mono in [-1, 1].
    """

    id: str  # equal ids mean interchangeable latents, e.g. dct-v1/c48/b8/g4
    channels: int
    static_channels: int = 0  # leading channels in which a still video has one value in all latents; audio: 0

    @property
    def clock(self) -> LatentClock: ...

    @property
    def published_stats(self) -> LatentStats | None:
        """Return the whitening statistics published with the codec; None if they are measured on the data."""
        return None

    def load(self) -> None:
        """Load the weights now instead of at first use. Raises ValueError if they are not found."""

    def encode(self, signal: Tensor) -> Float[Tensor, "n C *space"]:
        """Latents, float32; for video the first one is the first frame alone (``clock.head == 1``)."""
        ...

    def encode_batch(self, signals: Tensor) -> Float[Tensor, "b n C *space"]:
        """Return the latents of signals of equal length, ``(b, ...)``."""
        return torch.stack([self.encode(signal) for signal in signals])

    def decoder(self) -> StreamDecoder: ...

    def decode(self, latents: Float[Tensor, "n C *space"]) -> Tensor:
        """The whole signal at once; equal to pushing portions."""
        ...


class TextCodec(Protocol):
    """Captions and transcripts to the vectors that condition the network; there is no way back."""

    id: str  # equal ids mean interchangeable vectors, e.g. words-v2/d64
    width: int

    def load(self) -> None:
        """Load the weights now instead of at first use. Raises ValueError if they are not found."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a caption; a transcript brings its own."""
        ...

    def encode(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """One vector per word of a transcript, float32, whatever its place."""
        ...

    def encode_caption(self, caption: str) -> Float[Tensor, "L D"]:
        """One vector per word of a caption, float32, its place among them included."""
        ...
