"""Parse the command of `mfctl submit` with the options of that command."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from typer.exceptions import Exit, TyperException

from mfcore.errors import UserInputError
from workflows.cli.traits import traits_of
from workflows.jobs.command import ParsedCommand
from workflows.utils import environment


def parse_command(root_command: Any, argv: Sequence[str], base: str | None = None) -> ParsedCommand:
    """Parse ``argv`` as the job will parse it, below the root command of `mfctl`.

    ``base`` is the folder that relative paths start from in the job; default: the one of this process. ValueError if
    the command would reject its arguments.
    """
    if not argv:
        raise UserInputError(
            "nothing to submit: the command is missing. Add it after --, e.g. mfctl submit cluster/local.yaml -- doctor"
        )
    command, names, rest = _find_command(root_command, argv)
    with _temporary_base(base):
        try:
            values = command.make_context(" ".join(["mfctl", *names]), rest).params
        except TyperException as error:
            raise UserInputError(f"mfctl {' '.join(names)}: {error.format_message()}") from error
        except Exit:  # --help
            values = {}
        traits = traits_of(command.callback)
        return ParsedCommand(
            argv=tuple(argv),
            verb=names[0],
            values=values,
            paths=dict(_named_paths(command.params, traits.paths, values)),
            writes_runs=traits.writes_runs,
            driver_only=traits.driver_only,
        )


def _find_command(root_command: Any, argv: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    """Return the command that ``argv`` names, its names from the root down, and its arguments."""
    command, rest, names = root_command, list(argv), list[str]()
    while commands := getattr(command, "commands", None):
        if not rest or rest[0] not in commands:
            known = ", ".join(commands)
            raise UserInputError(
                f"`mfctl {' '.join(argv)}` is not a command. Use {' '.join(['mfctl', *names])} with one of {known}"
            )
        names.append(rest.pop(0))
        command = commands[names[-1]]
    return command, names, rest


@contextmanager
def _temporary_base(base: str | None) -> Iterator[None]:
    """Resolve relative paths against ``base`` while the context lasts."""
    before = os.environ.get(environment.CWD_ENV)
    if base is not None:
        os.environ[environment.CWD_ENV] = base
    try:
        yield
    finally:
        if base is not None:
            os.environ.pop(environment.CWD_ENV)
            if before is not None:
                os.environ[environment.CWD_ENV] = before


def _named_paths(
    parameters: Sequence[Any], path_names: Sequence[str], values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield option with value, and path, of every path parameter and of the one setting that is a path."""
    for parameter in parameters:
        if parameter.name not in path_names:
            continue
        given = values.get(parameter.name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value and "/" in value:  # without one it is the name of a run
                yield f"{max(parameter.opts, key=len)} {value}", value
    for text in values.get("sets") or []:
        name, _, value = text.partition("=")
        if name == "checkpoint.to" and value not in ("", "null"):
            yield text, environment.resolve_path(value)
