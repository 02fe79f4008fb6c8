"""Files of finished batches: arrays as safetensors, everything else as JSON in their metadata.

A file is data: reading one that somebody else wrote runs no code. Values come back bit by bit.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mfcore.metrics.av_sync import BlockStatistics
from preprocessing.toyworld.choices import ChoiceReading
from workflows.evaluation.clip_features import (
    ChunkBoundaryEnergy,
    ClipFeatures,
    FeatureTrack,
    SpeechSegment,
    ToyAudioFeatures,
    ToyVideoFeatures,
)
from workflows.evaluation.worker import TaskResult

Arrays = dict[str, NDArray[Any]]
_RECORDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(TaskResult, ClipFeatures, BlockStatistics, ChunkBoundaryEnergy, ToyVideoFeatures, ToyAudioFeatures),
        *(ChoiceReading, FeatureTrack, SpeechSegment),
    )
}


def write_batch(path: Path, result: TaskResult) -> None:
    """Write the result of a batch."""
    arrays: Arrays = {}
    structure = json.dumps(_encode(result, arrays))
    save_file(arrays, path, metadata={"result": structure})


def read_batch(path: Path) -> TaskResult | None:
    """Return the result of a batch; None without the file, or if it is damaged or of another version."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            result = _decode(json.loads(file.metadata()["result"]), arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return result if isinstance(result, TaskResult) else None


def _encode(value: Any, arrays: Arrays) -> Any:
    """Return ``value`` as JSON: every container is an object with one key, its kind. Arrays go into ``arrays``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | bytes):
        name, kind = f"{len(arrays):05d}", "array" if isinstance(value, np.ndarray) else "bytes"
        array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        arrays[name] = np.asarray(array, order="C")
        return {kind: name}
    if type(value).__name__ in _RECORDS:
        names = [f.name for f in fields(value)] if is_dataclass(value) else list(value._fields)
        return {type(value).__name__: {name: _encode(getattr(value, name), arrays) for name in names}}
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {"dict": [[_encode(key, arrays), _encode(item, arrays)] for key, item in items]}
    if isinstance(value, tuple | list):
        members = cast("tuple[Any, ...] | list[Any]", value)
        return {type(value).__name__: [_encode(item, arrays) for item in members]}
    raise TypeError(f"a {type(value).__name__} cannot be stored")


def _decode(value: Any, arrays: Arrays) -> Any:
    """Invert ``_encode``. Raises KeyError, TypeError or ValueError for anything else."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = cast(dict[str, Any], value).items()
    match kind:
        case "array":
            return arrays[content]
        case "bytes":
            return arrays[content].tobytes()
        case "dict":
            return {_decode(key, arrays): _decode(item, arrays) for key, item in content}
        case "tuple":
            return tuple(_decode(item, arrays) for item in content)
        case "list":
            return [_decode(item, arrays) for item in content]
        case _:
            return _RECORDS[kind](**{name: _decode(item, arrays) for name, item in content.items()})
