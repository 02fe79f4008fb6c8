"""The command of `mfctl submit`: its arguments, its paths and the traits declared at its function."""

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from tests.helpers.parsed_command import parse
from workflows.checkpoints.packaged import resolve_checkpoint
from workflows.cli.app import app
from workflows.cli.traits import traits_of
from workflows.utils import environment

PATH_PARSERS = (
    environment.resolve_path,
    environment.resolve_existing_path,
    environment.resolve_dataset,
    resolve_checkpoint,
)


def functions(command: Any, name: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield name and function of every command below this one."""
    for child in getattr(command, "commands", {}).items():
        yield from functions(child[1], f"{name} {child[0]}".strip())
    if not hasattr(command, "commands"):
        yield name, command.callback


@pytest.mark.parametrize(("name", "function"), list(functions(get_command(app))))
def test_every_path_parameter_is_declared(name: str, function: Callable[..., Any]) -> None:
    hints = get_type_hints(function, include_extras=True)
    found = {
        parameter
        for parameter, hint in hints.items()
        for info in getattr(hint, "__metadata__", ())
        if info.parser in PATH_PARSERS
    }
    assert set(traits_of(function).paths) == found


def test_traits_come_from_the_command() -> None:
    assert parse(["train", "--stage", "video"], "/shared").writes_runs
    assert not parse(["train", "--stage", "video"], "/shared").driver_only
    assert parse(["study"], "/shared").driver_only
    assert not parse(["doctor"]).writes_runs
    assert not parse(["bench", "stream"]).driver_only


def test_paths_start_from_the_folder_of_the_job() -> None:
    command = parse(["train", "--stage", "joint", "--data", "toy", "--from", "video", "--from", "s3://b/a"], "/shared")
    assert command.paths == {"--data /shared/toy": "/shared/toy", "--from s3://b/a": "s3://b/a"}
    assert command.argv[:3] == ("train", "--stage", "joint")


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "nothing to submit"), (["tarin"], "tarin"), (["bench", "stram"], "stram"), (["train"], "--stage")],
)
def test_a_wrong_command_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(words)
