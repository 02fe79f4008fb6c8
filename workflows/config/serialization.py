"""Configurations as JSON, from files and from ``--set a.b=value``; unknown names raise an error with a suggestion."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mfcore.errors import UserInputError

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as JSON values with every field."""
    return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a ``kind`` from JSON values; ValueError with the field, its value and the expected type."""
    try:
        return TypeAdapter(_strict(kind)).validate_python(values)
    except ValidationError as error:
        raise UserInputError(_explain(error)) from None


def fill_defaults(kind: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the defaults of settings that are newer than it.

    A configuration with unknown names or wrong values is returned unchanged: its differences are the caller's message.
    """
    try:
        return to_dict(from_dict(kind, stored))
    except UserInputError:
        return dict(stored)


def apply_overrides(config: T, values: Mapping[str, Any]) -> T:
    """Return ``config`` with nested ``values`` replaced; ValueError for an unknown name."""
    _check_names(config, values, "")
    _check_finite(values, "")
    return from_dict(type(config), _merge(to_dict(config), values))


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Return the nested settings of a YAML or JSON file; ValueError if it contains no mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserInputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserInputError(f"the configuration {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserInputError(
            f"{path} must contain settings by name, such as `steps: 200`, not a {type(values).__name__}"
        )
    return cast(dict[str, Any], values)


def parse_overrides(sets: Sequence[str]) -> dict[str, Any]:
    """Return ``["optim.lr=1e-3", "data.chunks=[3,6]"]`` as nested values; the right side is YAML.

    Settings of a run are at the top level: ``train.steps`` equals ``steps``.
    """
    out: dict[str, Any] = {}
    for text in sets:
        path, equals, value = text.partition("=")
        names = path.strip().removeprefix("train.").split(".")
        if not equals or not all(names):
            raise UserInputError(f"--set {text!r} is not of the form a.b=value, such as optim.lr=1e-3")
        parent = out
        for name in names[:-1]:
            parent = parent.setdefault(name, {})
            if not isinstance(parent, dict):
                raise UserInputError(f"--set {text!r} sets a part of {name!r}, which another --set replaces as a whole")
        parent[names[-1]] = _parse_value(text, value)
    return out


def _parse_value(text: str, value: str) -> Any:
    """Return the right side of ``--set text`` as YAML; empty text is the empty string."""
    try:
        return yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError:
        raise UserInputError(f"--set {text!r}: its value is not YAML; quote it, or close its brackets") from None


def diff(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line ``a.b: 1 -> 2`` for every value in which two configurations differ."""
    lines: list[str] = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += diff(cast(Mapping[str, Any], a), cast(Mapping[str, Any], b), f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as ``{"a.b": value}``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _check_names(config: Any, values: Mapping[str, Any], prefix: str) -> None:
    known = [f.name for f in fields(config)] if is_dataclass(config) else list(config)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"choose one of {', '.join(sorted(known))}"
            raise UserInputError(f"unknown setting {prefix}{name}: {hint}")
        inner = getattr(config, name) if is_dataclass(config) else config[name]
        if isinstance(value, Mapping) and (is_dataclass(inner) or isinstance(inner, Mapping)):
            _check_names(inner, cast(Mapping[str, Any], value), f"{prefix}{name}.")


def _check_finite(value: Any, name: str) -> None:
    """Raise UserInputError for infinity or NaN at any depth."""
    if isinstance(value, Mapping):
        for key, item in cast(Mapping[str, Any], value).items():
            _check_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            _check_finite(item, name)
    elif isinstance(value, float) and not isfinite(value):
        raise UserInputError(f"{name}={value}: use a finite number")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        current = out.get(key)
        nested = isinstance(current, Mapping) and isinstance(value, Mapping)
        out[key] = _merge(cast(Mapping[str, Any], current), cast(Mapping[str, Any], value)) if nested else value
    return out


def _strict(kind: Any) -> Any:
    """Make pydantic reject unknown keys in ``kind`` and its nested dataclasses; it ignores them by default."""
    for part in _dataclasses(kind, set()):
        part.__pydantic_config__ = STRICT
    return kind


def _dataclasses(kind: Any, seen: set[Any]) -> set[Any]:
    if is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        for f in fields(kind):
            _dataclasses(f.type, seen)
    for part in getattr(kind, "__args__", ()):
        _dataclasses(part, seen)
    return seen


def _errors_of_best_match(errors: Sequence[Any]) -> Sequence[Any]:
    """Return the errors of one union member: pydantic reports all members, and the best match has the fewest."""
    kinds: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    for error in errors:
        location = error["loc"]
        at = next((i for i, part in enumerate(location) if str(part).endswith("Config")), None)
        if at is None:
            return errors
        kinds.setdefault(location[:at], {}).setdefault(location[at], []).append(error)
    return min(next(iter(kinds.values())).values(), key=len)


def _explain(error: ValidationError) -> str:
    """Return the first error as one line; for a union, of the member that matches best."""
    first = _errors_of_best_match(error.errors())[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).endswith("Config"))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        if where and re.match(r"[\w.]+=", message) and not message.startswith(where):
            return f"{where}.{message}"
        return message
    return f"setting {where}: {message}, got {first['input']!r}"
