"""The reference pages agree with the commands and the configuration classes."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from workflows.cli.app import app

ROOT = Path(__file__).resolve().parents[3]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs/generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "configuration.md"])
def test_generated_tables_are_up_to_date(name: str) -> None:
    page = (ROOT / "docs/reference" / name).read_text()
    assert load_generator().render(page) == page, "run: python docs/generate_reference.py"


def commands(command: Any, name: str = "") -> Iterator[str]:
    """Yield the name of every command below this one."""
    for child, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {child}".strip())
    if not hasattr(command, "commands"):
        yield name


def test_every_command_has_a_section_with_its_options() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text()
    sections = dict(re.findall(r"^### `mfctl ([a-z ]*[a-z])[^`]*`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert {name for name, text in sections.items() if f"<!-- begin options {name} -->" in text} == set(
        commands(get_command(app))
    )


def test_every_setting_has_a_meaning() -> None:
    page = (ROOT / "docs/reference/configuration.md").read_text()
    assert [line for line in page.splitlines() if re.search(r"\|\s+\|$", line)] == []
