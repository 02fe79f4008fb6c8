"""The words of a command that is to run elsewhere, read here: what is wrong with them is said before anything runs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from workflows import environment

PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
)
"""Variables whose values must not travel."""
REFERENCES = (
    "AWS_CONFIG_FILE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_ROLE_ARN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MFCTL_TRACKER",
    "MLFLOW_S3_ENDPOINT_URL",
)
"""Variables that say where something is, credentials among it, and hold none."""
WRITES_RUNS = ("train", "evaluate", "study", "demo")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of mfctl, read by its own verb's rules."""

    verb: str
    values: Mapping[str, Any]  # of its arguments and options, by name
    places: Mapping[str, str]  # word as an error message names it -> local path or URI

    @property
    def sets(self) -> list[str]:
        return list(self.values.get("sets") or [])


def understand(argv: Sequence[str], base: str | None = None) -> Command:
    """Read a command as it will be read where it runs; ``base`` is the folder there that relative paths start from.

    ValueError in the words of its verb when it would be refused there.
    """
    from typer.exceptions import Exit, TyperException
    from typer.main import get_command

    from workflows.cli import app

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
        return Command(verb=names[0], values=values, places=dict(_places(command, values)))


@contextmanager
def _based(base: str | None) -> Iterator[None]:
    """Relative paths of the command mean ``base``, as they will where it runs."""
    before = os.environ.get(environment.BASE)
    if base is not None:
        os.environ[environment.BASE] = base
    try:
        yield
    finally:
        if base is not None:
            os.environ.pop(environment.BASE)
            if before is not None:
                os.environ[environment.BASE] = before


def _places(command: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The values that the verb takes for paths, and the one setting that is a path."""
    readers = (environment.absolute, environment.absolute_if_present)
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
            yield text, environment.absolute(value)


def check_places(command: Command, target: str, shared: str | None) -> None:
    """ValueError for what machines elsewhere would not find: local paths, runs without a shared folder, a SQLite "
    "store."""
    for word, place in command.places.items():
        local = place.removeprefix("file://") if "://" not in place or place.startswith("file://") else None
        if local is not None and not _under(local, shared):
            raise ValueError(
                f"{word} is a path of this machine, and {target} has others: write an s3:// or gs:// address, or name "
                f"the "
                "folder that all its machines have mounted, e.g. --shared /shared, and a path under it"
            )
    if command.verb in WRITES_RUNS and shared is None:
        raise ValueError(
            f"{command.verb} keeps its runs in a folder that all machines of {target} must see: name one that they "
            f"have "
            "mounted, e.g. --shared /shared (the files of this folder all mount one there)"
        )
    if command.verb in WRITES_RUNS and os.environ.get("MFCTL_TRACKER") != "json":
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None or uri.startswith(("sqlite:", "file:")) or "://" not in uri:
            raise ValueError(
                f"MLFLOW_TRACKING_URI={uri or '(not set: a SQLite file)'} cannot be written from several machines: "
                f"start the "
                "server of cluster/mlflow and set MLFLOW_TRACKING_URI to its http:// address (or MFCTL_TRACKER=json: "
                "no MLflow)"
            )


def _under(path: str, shared: str | None) -> bool:
    return shared is not None and os.path.commonpath([os.path.normpath(path), shared]) == shared


def check_secrets(words: Sequence[str], variables: Mapping[str, str]) -> None:
    """ValueError, without the secret in it, when a word or a variable that travels holds one: Ray shows both to all."""
    for name, value in variables.items():
        if PASSWORD.search(value):
            raise ValueError(
                f"{name} holds a password, and everybody who sees the job sees its environment: take it out and give "
                f"it to the "
                "machines by reference (see cluster/README.md, Credentials)"
            )
    values = {name: value for name in SECRETS if len(value := os.environ.get(name, "")) >= 8}
    for word in words:
        if PASSWORD.search(word):
            raise ValueError("the command holds an address with a password: everybody who sees the job would see it")
        for name, value in values.items():
            if value in word:
                raise ValueError(f"the command holds the value of {name}: everybody who sees the job would see it")
