"""Write the tables of docs/reference/cli.md and configuration.md from the commands and the configuration classes.

Run it after a change of an option or a setting. It replaces the text between ``<!-- begin ... -->`` and
``<!-- end -->``:

    options COMMAND          options of a command
    settings CLASS PREFIX    fields of a configuration class; the meaning is the comment at the field
"""

import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.main import get_command

from workflows.cli.app import app

PAGES = tuple(Path(__file__).resolve().parent / "reference" / name for name in ("cli.md", "configuration.md"))
_BLOCK = re.compile(r"(<!-- begin (options|settings) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """Return the text of a page with all its tables generated."""

    def table(match: re.Match[str]) -> str:
        words = match[3].split()
        rows = option_rows(words) if match[2] == "options" else setting_rows(*words)
        head = "option | meaning" if match[2] == "options" else "setting | type | default | meaning"
        rule = "-|" * len(head.split("|"))
        return "\n".join([f"{match[1]}\n| {head} |", f"|{rule}", *rows, "", match[4]])

    return _BLOCK.sub(table, page)


def option_rows(names: list[str]) -> Iterator[str]:
    """Yield a table row for each option of a command."""
    command: Any = get_command(app)
    for name in names:
        command = command.commands[name]
    for parameter in command.params:
        if getattr(parameter, "param_type_name", "") != "option" or "--help" in parameter.opts:
            continue
        flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
        meaning = _cell(parameter.help or "").removesuffix(".")
        yield f"| {_with_value(flags, parameter)} | {meaning}{_option_default(parameter)} |"


def _with_value(flags: str, parameter: Any) -> str:
    """Return the flags, the last one with the kind of its value."""
    kind = parameter.type_descriptor.annotation
    if parameter.is_flag or kind is bool:
        return flags
    kind = next((part for part in get_args(kind) if part is not type(None)), kind) if _is_union(kind) else kind
    names = (
        "|".join(get_args(kind)) if get_origin(kind) is Literal else {int: "N", float: "X", str: "TEXT"}.get(kind, "")
    )
    return f"{flags[:-1]} {_cell(parameter.metavar or names)}`"


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _option_default(parameter: Any) -> str:
    if parameter.required:
        return " (required)"
    if isinstance(parameter.show_default, str):
        return f" (default: {_cell(parameter.show_default)})"
    value = parameter.default
    if parameter.is_flag or value in (None, "", [], ()) or callable(value) or parameter.show_default is False:
        return ""
    return f" (default: {_cell(f'{value:g}' if isinstance(value, float) else str(value))})"


def setting_rows(path: str, prefix: str = "") -> Iterator[str]:
    """Yield a table row for each field of the configuration class at ``module.Class``."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name)
    hints, comments = get_type_hints(kind), field_comments(kind)
    for field in fields(kind):
        name = f"{prefix}.{field.name}" if prefix else field.name
        meaning = _cell(comments[field.name].replace("None", "null"))
        if meaning or "section" not in _kind(hints[field.name]):  # a section without a comment has its own table
            yield f"| `{name}` | {_kind(hints[field.name])} | {_default(field)} | {meaning} |"


def field_comments(kind: type) -> dict[str, str]:
    """Return the comment of each field: at the end of its line, or in the comment lines above or below it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    nodes = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    ends = [(node.end_lineno or 0, node.end_col_offset or 0) for node in nodes]
    names = [ast.unparse(node.target) for node in nodes]
    found = {name: lines[line - 1][column:].strip(" #") for name, (line, column) in zip(names, ends, strict=True)}
    for i, (line, _) in enumerate(ends):
        block: list[str] = []
        for below in lines[line:]:
            if not below.strip().startswith("#"):
                break
            block.append(below.strip(" #"))
        following = names[i + 1] if i + 1 < len(names) else None
        owner = following if following and not found[following] else names[i]
        found[owner] = " ".join([found[owner], *block]).strip()
    return found


def _kind(hint: Any) -> str:
    """Return a type as text."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if _is_union(hint):
        return " or ".join("null" if part is type(None) else _kind(part) for part in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if inner[-1] is Ellipsis else f"[{', '.join(map(_kind, inner))}]"
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is not None and len(inner) == 2:
        return f"{_kind(inner[1])} by {'modality' if inner[0] is str else _kind(inner[0])}"
    if is_dataclass(hint):
        return "section"
    return {str: "text", Fraction: "fraction"}.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: "Field[Any]") -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "preset"
    value = field.default if field.default is not MISSING else field.default_factory()  # pyright: ignore
    if is_dataclass(value):
        return "section"
    if value == "":
        return "empty"
    if isinstance(value, str | Fraction):
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value, default=str)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write both pages."""
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
