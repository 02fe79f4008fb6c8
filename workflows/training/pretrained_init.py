"""Pretrained initial weights: Wan's video transformer from a folder in diffusers format."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfcore.codecs.t5 import T5TextEncoder, t5_config_from_folder
from mfcore.errors import UserInputError
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from mfcore.model.wan_weights import WeightMapping, map_wan_weights
from mfcore.weights import load_strict
from workflows.config.run import RunConfig
from workflows.utils import distributed

FOLDER_HINT = "name the diffusers folder of a Wan text-to-video model, or its transformer/ folder"
REQUIRED_WAN_CONFIG = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "freq_dim": 256,
}  # architecture of a branch


def load_wan_weights(model: nn.Module, config: ModelConfig, folder: str) -> None:
    """Load Wan's weights into the video branch of ``model``. Raise ValueError if they do not fit.

    The null branch starts as the empty prompt if ``folder`` has the text encoder, else as padding alone.
    """
    initial = model.state_dict()
    empty = _encode_empty_prompt(folder, config)
    mapping = map_wan_weights(_read(folder, config, meta=False), initial, config, empty_caption=empty)
    load_strict(model, initial | mapping.weights, folder)


def _encode_empty_prompt(folder: str, config: ModelConfig) -> Tensor | None:
    if not Path(folder, "text_encoder").is_dir():
        return None
    encoder = t5_config_from_folder(folder)
    return (
        T5TextEncoder(encoder, distributed.local_device()).encode_empty() if encoder.width == config.text_dim else None
    )


def describe_wan_import(config: RunConfig) -> dict[str, str]:
    """Return a table of the weights that a run loads from ``init_video``, without reading them.

    Raises ValueError if they do not fit. Returns {} without ``init_video``.
    """
    if not config.init_video:
        return {}
    with torch.device("meta"):
        model = AVTransformer(config.model)
    wan = _read(config.init_video, config.model, meta=True)
    return {"init_video": _table(map_wan_weights(wan, model.state_dict(), config.model))}


def _read(folder: str, config: ModelConfig, *, meta: bool) -> dict[str, Tensor]:
    root = Path(folder)
    root = root / "transformer" if (root / "transformer").is_dir() else root
    files = sorted(root.glob("*.safetensors"))
    if not files or not (root / "config.json").exists():
        raise UserInputError(f"{folder} has no config.json with *.safetensors: {FOLDER_HINT}")
    _check_architecture(folder, json.loads((root / "config.json").read_text()), config)
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    shape = file.get_slice(name).get_shape()
                    weights[name] = torch.empty(shape, device="meta") if meta else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{path} cannot be read: {error}") from None
    return weights


def _check_architecture(folder: str, found: dict[str, Any], config: ModelConfig) -> None:
    """Raise ValueError for settings that tensor shapes cannot reveal."""
    if found.get("_class_name") != "WanTransformer3DModel":
        raise UserInputError(f"{folder} is a {found.get('_class_name')}: {FOLDER_HINT}")
    expected = {**REQUIRED_WAN_CONFIG, "num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    differences = [f"{k} {found[k]} there, {v} here" for k, v in expected.items() if k in found and found[k] != v]
    if differences:
        raise UserInputError(f"{folder} has another architecture: {'; '.join(differences)}")


def _table(mapping: WeightMapping) -> str:
    """Format a mapping as a text table with one line for equal weights of all blocks."""
    rows = [
        *(("loaded", name, ", ".join(sources)) for name, sources in mapping.loaded.items()),
        *(("initialized", name, "") for name in mapping.initialized),
        *(("skipped", "", name) for name in mapping.skipped),
    ]
    anywhere = re.compile(r"\bblocks\.\d+\.")
    counted = Counter(tuple(anywhere.sub("blocks.*.", part) for part in row) for row in rows)
    lines = [f"{kind:12} {n:4} x {own:48} {source}".rstrip() for (kind, own, source), n in counted.items()]
    return "\n".join([f"{'':12} {'':6} {'weight of the video branch':48} of Wan", *lines])
