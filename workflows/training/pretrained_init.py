"""Weights from elsewhere that a run starts from: Wan's video transformer, from a folder as diffusers saves it."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer
from mfcore.model.wan_weights import WeightMapping, map_wan_weights
from mfcore.weights import load_strict
from workflows.config.run import RunConfig

FOLDER_HINT = "name the folder of a Wan text-to-video model as diffusers saves it, or its transformer/ folder"
REQUIRED_WAN_CONFIG = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "freq_dim": 256,
}  # what a branch is built as


def load_wan_weights(model: nn.Module, config: ModelConfig, folder: str) -> None:
    """Put Wan's weights into the video branch of ``model``. ValueError says what does not fit."""
    own = model.state_dict()
    taken = map_wan_weights(_read(folder, config, meta=False), own, config)
    load_strict(model, own | taken.weights, folder)


def describe_wan_import(config: RunConfig) -> dict[str, str]:
    """What a run will take from ``init_video``, as a table, found out without reading a weight. ValueError as above."""
    if not config.init_video:
        return {}
    with torch.device("meta"):
        model = AVTransformer(config.model)
    wan = _read(config.init_video, config.model, meta=True)
    return {"init_video": _table(map_wan_weights(wan, model.state_dict(), config.model))}


def _read(folder: str, config: ModelConfig, *, meta: bool) -> dict[str, Tensor]:
    place = Path(folder)
    place = place / "transformer" if (place / "transformer").is_dir() else place
    files = sorted(place.glob("*.safetensors"))
    if not files or not (place / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json with *.safetensors: {FOLDER_HINT}")
    _check_facts(folder, json.loads((place / "config.json").read_text()), config)
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    shape = file.get_slice(name).get_shape()
                    weights[name] = torch.empty(shape, device="meta") if meta else file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return weights


def _check_facts(folder: str, facts: dict[str, Any], config: ModelConfig) -> None:
    """What shapes do not show."""
    if facts.get("_class_name") != "WanTransformer3DModel":
        raise ValueError(f"{folder} is a {facts.get('_class_name')}: {FOLDER_HINT}")
    here = {**REQUIRED_WAN_CONFIG, "num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    odd = [f"{k} {facts[k]} there, {v} here" for k, v in here.items() if k in facts and facts[k] != v]
    if odd:
        raise ValueError(f"{folder} is built otherwise: {'; '.join(odd)}")


def _table(taken: WeightMapping) -> str:
    """For people: blocks are counted, not listed."""
    rows = [
        *(("loaded", name, ", ".join(sources)) for name, sources in taken.loaded.items()),
        *(("initialised", name, "") for name in taken.initialised),
        *(("skipped", "", name) for name in taken.skipped),
    ]
    anywhere = re.compile(r"\bblocks\.\d+\.")
    counted = Counter(tuple(anywhere.sub("blocks.*.", part) for part in row) for row in rows)
    lines = [f"{kind:12} {n:4} x {own:48} {source}".rstrip() for (kind, own, source), n in counted.items()]
    return "\n".join([f"{'':12} {'':6} {'weight of the video branch':48} of Wan", *lines])
