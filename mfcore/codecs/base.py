"""Interfaces of codecs: signal to latents, and latents to signal as a whole or as a stream."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.timeline import LatentClock


class StreamDecoder(Protocol):
    """Streaming decoder; the concatenated output does not depend on how the latents are split."""

    def push(self, latents: Float[Tensor, "n C *space"]) -> Tensor:
        """Return the signal that is final; may be empty, because some decoders look ahead."""
        ...

    def flush(self) -> Tensor:
        """Return the rest of the signal; the decoder cannot be used afterwards."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the state between two calls of ``push``, to continue in another process."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of a decoder of the same codec."""
        ...


class Codec(Protocol):
    """Codec of one modality.

    Video signals are uint8 ``(frames, height, width, 3)`` RGB; audio float32 ``(samples,)`` mono in [-1, 1].
    """

    id: str  # equal ids mean interchangeable latents, e.g. dct-v1/c48/b8/g4
    channels: int
    static_channels: int = 0  # leading channels in which a still video has one value in all latents; audio: 0

    @property
    def clock(self) -> LatentClock:
        """Rate and offset of the latents."""
        ...

    @property
    def published_stats(self) -> LatentStats | None:
        """Return the whitening statistics published with the codec; None if they are measured on the data."""
        return None

    def load(self) -> None:
        """Load the weights now instead of at first use. Raises ValueError if they are not found."""

    def encode(self, signal: Tensor) -> Float[Tensor, "n C *space"]:
        """Return float32 latents; for video, the first one is the first frame alone (``clock.head == 1``)."""
        ...

    def encode_batch(self, signals: Tensor) -> Float[Tensor, "b n C *space"]:
        """Return the latents of signals of equal length, ``(b, ...)``."""
        return torch.stack([self.encode(signal) for signal in signals])

    def decoder(self) -> StreamDecoder:
        """Return a new streaming decoder."""
        ...

    def decode(self, latents: Float[Tensor, "n C *space"]) -> Tensor:
        """Return the whole signal, equal to the output of :meth:`decoder`."""
        ...


class TextCodec(Protocol):
    """Encoder of captions and transcripts into the vectors that condition the network."""

    id: str  # equal ids mean interchangeable vectors, e.g. words-v2/d64
    width: int

    def load(self) -> None:
        """Load the weights now instead of at first use. Raises ValueError if they are not found."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a caption."""
        ...

    def encode(self, words: Sequence[str]) -> Float[Tensor, "L D"]:
        """Return one float32 vector per word of a transcript, independent of its position."""
        ...

    def encode_caption(self, caption: str) -> Float[Tensor, "L D"]:
        """Return one float32 vector per word of a caption, including its position."""
        ...
