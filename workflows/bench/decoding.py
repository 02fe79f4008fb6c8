"""What decoding a chunk costs: apart from the network, and for codecs that need no weights."""

from collections.abc import Mapping
from statistics import median

import torch

from mfcore.codecs.dct import DctCodec
from mfcore.codecs.mel import MelCodec
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from workflows.bench import limits
from workflows.geometry import EMBEDDED, Geometry


def decode_ms(
    known: Geometry, shapes: Mapping[str, tuple[int, ...]], timeline: Timeline, chunks: int
) -> dict[str, float] | None:
    """Milliseconds by modality, the median of ``chunks``; None for codecs whose weights are not here."""
    if known != EMBEDDED:
        return None
    codecs = {VIDEO: DctCodec(), AUDIO: MelCodec()}
    draw = torch.Generator().manual_seed(0)
    taken: dict[str, float] = {}
    for m, shape in shapes.items():
        decoder = codecs[m].decoder()
        decoder.push(torch.randn((1, *shape), generator=draw))  # the first frame
        times: list[float] = []
        for k in range(chunks):
            latents = torch.randn((timeline.count(m, 1, k), *shape), generator=draw)
            times.append(limits.timed(torch.device("cpu"), decoder.push, latents)[0])
        taken[m] = 1e3 * median(times)
    return taken
