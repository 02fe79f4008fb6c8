"""From the ids that travel with a model back to the codecs that made its latents."""

import re

from mfcore.codecs.base import Codec
from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.mel import MelCodec, MelConfig
from mfcore.codecs.words import HashedWords
from mfcore.timeline import LatentClock


def build_codec(codec_id: str, clock: LatentClock) -> Codec:
    """The codec of this id; ``clock`` (of the dataset or the model) gives the frame rate, which an id does not hold."""
    numbers = {key: int(value) for key, value in re.findall(r"/([a-z])(\d+)", codec_id)}
    name = codec_id.split("/")[0]
    if name == "dct-v1":
        fps = clock.rate * numbers["g"]
        codec: Codec = DctCodec(
            DctConfig(channels=numbers["c"], block=numbers["b"], group=numbers["g"], fps=fps),
        )
    elif name == "mel-v1":
        codec = MelCodec(
            MelConfig(
                sample_rate=numbers["r"],
                window=numbers["w"],
                hop=numbers["h"],
                mels=numbers["m"],
                group=numbers["g"],
                channels=numbers["c"],
            )
        )
    else:
        raise ValueError(
            f"unknown codec {codec_id!r}: this mfctl knows dct-v1 and mel-v1; update it, or encode the data again"
        )
    if codec.id != codec_id:
        raise ValueError(
            f"codec {codec_id!r} was made by another version (this one makes {codec.id!r}): encode the data again"
        )
    return codec


def build_text_codec(codec_id: str) -> HashedWords:
    """The text encoder of this id."""
    match = re.fullmatch(r"words-v1/d(\d+)", codec_id)
    if match is None:
        raise ValueError(f"unknown text codec {codec_id!r}: this mfctl knows words-v1")
    return HashedWords(width=int(match[1]))
