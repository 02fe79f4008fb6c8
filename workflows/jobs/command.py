"""A parsed command, and the checks of its paths and secrets before it is submitted to other machines."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfcore.errors import UserInputError

PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
SECRET_ENV = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
)
"""Secret variables; their values must not leave this machine."""
FORWARDED_ENV = (
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
"""Variables with locations, for example of credential files; none holds a secret itself."""
MIN_SECRET_LENGTH = 8  # shorter values occur in ordinary text


@dataclass(frozen=True, kw_only=True)
class ParsedCommand:
    """A command of mfctl with its arguments parsed; made by ``workflows.cli.parse``."""

    argv: tuple[str, ...]  # as given, without "mfctl"
    verb: str
    values: Mapping[str, Any]  # of its arguments and options, by name; empty for --help
    paths: Mapping[str, str]  # option and value, as error messages show them -> local path or URI
    writes_runs: bool = False  # writes run directories and tracking entries
    driver_only: bool = False  # computes in the process of the command, not in Ray workers

    @property
    def sets(self) -> list[str]:
        """The values of ``--set``."""
        return list(self.values.get("sets") or [])


def check_paths(command: ParsedCommand, target: str, shared: str | None) -> None:
    """Raise ValueError for arguments that other machines cannot resolve.

    These are local paths, runs without a shared folder, and tracking stores that are local files.
    """
    for option, path in command.paths.items():
        local = path.removeprefix("file://") if "://" not in path or path.startswith("file://") else None
        if local is not None and not _is_below(local, shared):
            raise UserInputError(
                f"{option} is a path of this machine, not of {target}. Use an s3:// or gs:// URI, or --shared DIR "
                "(mounted on all machines) and a path below it"
            )
    if command.writes_runs and shared is None:
        raise UserInputError(
            f"{command.verb} writes its runs into a folder that all machines of {target} must have mounted. Add "
            "--shared DIR, e.g. --shared /shared, where the files of cluster/ mount one"
        )
    if command.writes_runs and os.environ.get("MFCTL_TRACKER") != "json":
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None or uri.startswith(("sqlite:", "file:")) or "://" not in uri:
            raise UserInputError(
                f"MLFLOW_TRACKING_URI={uri or '(not set: a SQLite file)'} cannot be written from several machines. "
                "Start the server of cluster/mlflow and set MLFLOW_TRACKING_URI to its http:// address, or set "
                "MFCTL_TRACKER=json to run without MLflow"
            )


def _is_below(path: str, shared: str | None) -> bool:
    return shared is not None and os.path.commonpath([os.path.normpath(path), shared]) == shared


def check_secrets(argv: Sequence[str], variables: Mapping[str, str]) -> None:
    """Raise ValueError if an argument or a forwarded variable contains a secret.

    Ray shows both to everyone who reaches the job server. The message does not contain the secret.
    """
    for name, value in variables.items():
        if PASSWORD_IN_URL.search(value):
            raise UserInputError(
                f"{name} contains a password, which everyone who sees the job could read. Remove it and give it to "
                "the machines by reference (see cluster/README.md, Credentials)"
            )
    secrets = secret_values()
    for argument in argv:
        if PASSWORD_IN_URL.search(argument):
            raise UserInputError(
                "the command contains a URL with a password, which everyone who sees the job could read. Remove it"
            )
        for name, value in secrets.items():
            if value in argument:
                raise UserInputError(
                    f"the command contains the value of {name}, which everyone who sees the job could read. Remove it"
                )


def secret_values() -> dict[str, str]:
    """Return the secret variables that are set in this process, with their values."""
    values = {name: os.environ.get(name, "") for name in SECRET_ENV}
    return {name: value for name, value in values.items() if len(value) >= MIN_SECRET_LENGTH}
