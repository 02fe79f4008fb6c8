"""Weights of pretrained codecs: location, digest, device and precision.

Ids stored with datasets and checkpoints contain a digest of the weights, not a path. A codec from an id looks for its
weights in the folder stored in the dataset or checkpoint and in the folders of ``MFCTL_CODECS``. It looks for them at
the first encoding or decoding, so training on latents needs no weights. Nothing is downloaded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mfcore.errors import UserInputError

CODECS_ENV = "MFCTL_CODECS"
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16  # parts of a weights file that are hashed, instead of gigabytes


def model_folder(folder: str, inside: str, kinds: Sequence[str], what: str) -> Path:
    """Return ``folder`` or its subfolder ``inside``, the first with a ``config.json`` of one of ``kinds``.

    Raises ValueError if both have none.
    """
    for path in (Path(folder), Path(folder, inside)):
        if (config := path / "config.json").is_file() and model_kind(read_config(config)) in kinds:
            return path
    raise UserInputError(
        f"{folder} contains no {what}: name the folder with config.json and safetensors, or its parent with {inside}/"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model. Raises ValueError if it is not JSON."""
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserInputError(f"{path} is not valid JSON: {error}") from None


def model_kind(config: dict[str, Any]) -> str:
    """Return the diffusers class or the transformers type of a ``config.json``."""
    return str(config.get("_class_name") or config.get("model_type"))


def weights_digest(folder: Path, more: Sequence[Path] = ()) -> str:
    """Return 12 hexadecimal digits of the configuration, the tensors of ``folder`` and the files ``more``.

    Only samples of large files are read. Raises ValueError without safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserInputError(f"{folder} contains no .safetensors: convert pickled weights to safetensors")
    config = {k: v for k, v in read_config(folder / "config.json").items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in [*weights, *sorted(more)]:
        digest.update(_hash_samples(path))
    return digest.hexdigest()[:12]


def _hash_samples(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def locate_weights(weights: str, hint: str, digest_of: Callable[[str], str], codec_id: str) -> str:
    """Return the folder with the weights of this digest: ``hint``, a folder of ``MFCTL_CODECS`` or a child of one.

    Raises ValueError if no folder has it.
    """
    listed = [Path(name) for name in os.environ.get(CODECS_ENV, "").split(os.pathsep) if name]
    candidates = [Path(hint), *listed] if hint else list(listed)
    for path in filter(Path.is_dir, listed):
        candidates += [child for child in sorted(path.iterdir()) if child.is_dir()]
    for path in candidates:
        try:
            if digest_of(str(path)) == weights:
                return str(path)
        except (OSError, ValueError):
            continue  # folder of another model
    reason = f"{hint} does not contain them" if hint else "no folder is known"
    raise UserInputError(
        f"cannot find the weights of codec {codec_id}: {reason}. Set {CODECS_ENV} to their folder "
        f"(separate several by {os.pathsep!r})"
    )


def compute_device(device: torch.device | str | None) -> torch.device:
    """Return ``device``, by default the GPU if available."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for a GPU, else float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
