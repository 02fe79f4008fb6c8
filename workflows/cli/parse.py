import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from workflows.jobs.command import ParsedCommand
from workflows.utils import environment


def parse_command(argv: Sequence[str], base: str | None = None) -> ParsedCommand:
    """Read a command as it will be read where it runs; ``base`` is the folder there that relative paths start from.

    ValueError in the words of its verb when it would be refused there.
    """
    from typer.exceptions import Exit, TyperException
    from typer.main import get_command

    from workflows.cli.app import app

    command, rest, names = get_command(app), list(argv), list[str]()
    while commands := getattr(command, "commands", None):
        if not rest or rest[0] not in commands:
            known = ", ".join(commands)
            raise ValueError(
                f"`mfctl {' '.join(argv)}` is no command: after {' '.join(['mfctl', *names])} comes {known}"
            )
        names.append(rest.pop(0))
        command = commands[names[-1]]
    with _based(base):
        try:
            values = command.make_context(" ".join(["mfctl", *names]), rest).params
        except TyperException as error:
            raise ValueError(f"mfctl {' '.join(names)}: {error.format_message()}") from error
        except Exit:  # --help
            values = {}
        return ParsedCommand(verb=names[0], values=values, paths=dict(_places(command, values)))


@contextmanager
def _based(base: str | None) -> Iterator[None]:
    """Relative paths of the command mean ``base``, as they will where it runs."""
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


def _places(command: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The values that the verb takes for paths, and the one setting that is a path."""
    readers = (environment.resolve_path, environment.resolve_existing_path)
    for parameter in command.params:
        if parameter.type_descriptor.parameter_info.parser not in readers:
            continue
        given = values.get(parameter.name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value and (parameter.type_descriptor.parameter_info.parser is readers[0] or "/" in value):
                yield f"{max(parameter.opts, key=len)} {value}", value
    for text in values.get("sets") or []:
        name, _, value = text.partition("=")
        if name == "checkpoint.to" and value not in ("", "null"):
            yield text, environment.resolve_path(value)
