"""What a codec promises: signal to latents, latents back to signal, the second one also piece by piece."""

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

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
    """One modality's codec. Video signals are uint8 ``(frames, height, width, 3)`` RGB; audio float32 ``(samples,)`` mono
    in [-1, 1]."""

    @property
    def id(self) -> str:
        """Equal ids mean interchangeable latents, e.g. ``dct-v1/c48/b8/g4``."""
        ...

    @property
    def channels(self) -> int: ...

    @property
    def clock(self) -> LatentClock: ...

    def encode(self, signal: Tensor) -> Float[Tensor, "n C *space"]:
        """Latents, float32; for video the first one is the first frame alone (``clock.head == 1``)."""
        ...

    def decoder(self) -> StreamDecoder: ...

    def decode(self, latents: Float[Tensor, "n C *space"]) -> Tensor:
        """The whole signal at once; equal to pushing portions."""
        ...
