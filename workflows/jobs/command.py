"""The words of a command that is to run elsewhere, read here: what is wrong with them is said before anything runs."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
"""Variables whose values must not travel."""
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
"""Variables that say where something is, credentials among it, and hold none."""


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
        return list(self.values.get("sets") or [])


def check_paths(command: ParsedCommand, target: str, shared: str | None) -> None:
    """ValueError for what machines elsewhere would not find: local paths, runs without a shared folder, a SQLite "
    "store."""
    for word, place in command.paths.items():
        local = place.removeprefix("file://") if "://" not in place or place.startswith("file://") else None
        if local is not None and not _under(local, shared):
            raise ValueError(
                f"{word} is a path of this machine, and {target} has others: write an s3:// or gs:// address, or name "
                f"the "
                "folder that all its machines have mounted, e.g. --shared /shared, and a path under it"
            )
    if command.writes_runs and shared is None:
        raise ValueError(
            f"{command.verb} keeps its runs in a folder that all machines of {target} must see: name one that they "
            f"have "
            "mounted, e.g. --shared /shared (the files of this folder all mount one there)"
        )
    if command.writes_runs and os.environ.get("MFCTL_TRACKER") != "json":
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
        if PASSWORD_IN_URL.search(value):
            raise ValueError(
                f"{name} holds a password, and everybody who sees the job sees its environment: take it out and give "
                f"it to the "
                "machines by reference (see cluster/README.md, Credentials)"
            )
    values = {name: value for name in SECRET_ENV if len(value := os.environ.get(name, "")) >= 8}
    for word in words:
        if PASSWORD_IN_URL.search(word):
            raise ValueError("the command holds an address with a password: everybody who sees the job would see it")
        for name, value in values.items():
            if value in word:
                raise ValueError(f"the command holds the value of {name}: everybody who sees the job would see it")
