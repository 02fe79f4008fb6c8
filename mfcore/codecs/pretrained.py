"""What the pretrained codecs share: where their weights are, which ones they are, and in what they compute.

Ids that travel with datasets and checkpoints hold a digest of the weights, not a path. A codec built from an id finds
its weights in the folder that the dataset or checkpoint remembers, or in those that ``MFCTL_CODECS`` lists; it looks
for them when it first encodes or decodes, so that training on latents needs no weights at all. Nothing is downloaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

CODECS_ENV = "MFCTL_CODECS"
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16  # read of every file of weights: gigabytes need not be hashed to tell two apart


def model_folder(folder: str, inside: str, kinds: Sequence[str], what: str) -> Path:
    """``folder``, or its subfolder ``inside``, whichever holds a ``config.json`` of one of these classes or types.

    ValueError when neither does.
    """
    for place in (Path(folder), Path(folder, inside)):
        if (config := place / "config.json").is_file() and model_kind(read_config(config)) in kinds:
            return place
    raise ValueError(
        f"{folder} holds no {what}: name the folder with its config.json and safetensors, or the one above {inside}/"
    )


def read_config(path: Path) -> dict[str, Any]:
    """A model's ``config.json``. ValueError when it is not JSON."""
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def model_kind(config: dict[str, Any]) -> str:
    """The diffusers class or the transformers type that a ``config.json`` is for."""
    return str(config.get("_class_name") or config.get("model_type"))


def weights_digest(folder: Path, more: Sequence[Path] = ()) -> str:
    """12 hexadecimal digits that change with the configuration, the tensors of ``folder`` or the files ``more``.

    Of large files only the ends and some parts between are read. ValueError when there are no safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors: pickled weights are not read, convert them first")
    config = {k: v for k, v in read_config(folder / "config.json").items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in [*weights, *sorted(more)]:
        digest.update(_sampled(path))
    return digest.hexdigest()[:12]


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def locate_weights(weights: str, hint: str, digest_of: Callable[[str], str], codec_id: str) -> str:
    """The folder whose weights have this digest: ``hint``, a folder of ``MFCTL_CODECS``, or one directly inside those.

    ValueError says how to name it.
    """
    listed = [Path(name) for name in os.environ.get(CODECS_ENV, "").split(os.pathsep) if name]
    inside = [child for place in listed if place.is_dir() for child in sorted(place.iterdir()) if child.is_dir()]
    for place in [*([Path(hint)] if hint else []), *listed, *inside]:
        try:
            if digest_of(str(place)) == weights:
                return str(place)
        except (OSError, ValueError):
            continue  # another model's folder
    remembered = f"{hint} (where it was made) does not hold them" if hint else "no folder is known"
    raise ValueError(
        f"the weights of codec {codec_id} are needed and {remembered}: set {CODECS_ENV} to the folder that does "
        f"(several are separated by {os.pathsep!r})"
    )


def compute_device(device: torch.device | str | None) -> torch.device:
    """``device``, or by default the GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
