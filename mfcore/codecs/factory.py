"""Codecs from configurations, and from the ids stored with datasets and models."""

import re
from fractions import Fraction

import torch

from mfcore.codecs.base import Codec, TextCodec
from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.hashed_words import HashedWordEncoder
from mfcore.codecs.mel import MelCodec, MelConfig
from mfcore.codecs.oobleck import OobleckCodec, OobleckConfig
from mfcore.codecs.t5 import T5Config, T5TextEncoder
from mfcore.codecs.wan import WanCodec, WanConfig
from mfcore.errors import UserInputError
from mfcore.timeline import LatentClock

VideoConfig = DctConfig | WanConfig
AudioConfig = MelConfig | OobleckConfig


def codec_from_config(config: VideoConfig | AudioConfig, device: torch.device | str | None = None) -> Codec:
    """Return the codec of a configuration; pretrained ones run on ``device`` (default: the GPU if available)."""
    if isinstance(config, DctConfig):
        return DctCodec(config)
    if isinstance(config, MelConfig):
        return MelCodec(config)
    return WanCodec(config, device) if isinstance(config, WanConfig) else OobleckCodec(config, device)


def codec_from_id(
    codec_id: str, clock: LatentClock, folder: str = "", device: torch.device | str | None = None
) -> Codec:
    """Return the codec of an id; ``clock`` of the dataset or model gives the frame rate, which ids do not contain.

    ``folder`` is the first place where a pretrained codec looks for its weights. Raises ValueError for an unknown id.
    """
    # The first of two numbers with one letter counts, because a digest in the last part may look like a number.
    numbers = {key: int(value) for key, value in reversed(re.findall(r"/([a-z])(\d+)(?=/|$)", codec_id))}
    name, weights = codec_id.split("/")[0], codec_id.rsplit("/", 1)[-1]
    try:
        config = _config_of(name, numbers, rate=clock.rate, weights=weights, folder=folder)
    except KeyError:
        raise UserInputError(
            f"unknown codec {codec_id!r}: supported are dct-v1, mel-v1, wan-v1 and oobleck-v1. Update mfctl, or encode "
            "the data again"
        ) from None
    codec = codec_from_config(config, device)
    if codec.id != codec_id:
        raise UserInputError(
            f"codec {codec_id!r} is of another version (this one is {codec.id!r}). Encode the data again"
        )
    return codec


def _config_of(name: str, n: dict[str, int], *, rate: Fraction, weights: str, folder: str) -> VideoConfig | AudioConfig:
    """Return the configuration from the numbers ``n`` of an id by letter. Raises KeyError if it is unknown."""
    if name == "dct-v1":
        return DctConfig(channels=n["c"], block=n["b"], group=n["g"], fps=rate * n["g"])
    if name == "mel-v1":
        return MelConfig(sample_rate=n["r"], window=n["w"], hop=n["h"], mels=n["m"], group=n["g"], channels=n["c"])
    if name == "wan-v1":
        return WanConfig(channels=n["c"], block=n["b"], weights=weights, fps=rate * n["g"], folder=folder)
    if name == "oobleck-v1":
        return OobleckConfig(channels=n["c"], sample_rate=n["r"], hop=n["h"], weights=weights, folder=folder)
    raise KeyError(name)


def text_codec_from_id(codec_id: str, folder: str = "", device: torch.device | str | None = None) -> TextCodec:
    """Return the text encoder of an id. Raises ValueError for an unknown id."""
    if match := re.fullmatch(r"words-v([12])/d(\d+)", codec_id):
        return HashedWordEncoder(width=int(match[2]), version=int(match[1]))
    if match := re.fullmatch(r"t5-v1/d(\d+)/([0-9a-f]+)", codec_id):
        return T5TextEncoder(T5Config(width=int(match[1]), weights=match[2], folder=folder), device)
    raise UserInputError(f"unknown text codec {codec_id!r}: supported are words-v1, words-v2 and t5-v1")
