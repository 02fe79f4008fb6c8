"""Registry of MLflow: logged models, versions of registered models, and their aliases."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from workflows.tracking import mlflow_tracker
from workflows.tracking.mlflow_tracker import MlflowTracker, exists_on_server, missing_on_server
from workflows.utils.environment import hide_passwords

DIGEST_TAG = "mfctl.digest"  # of the exported files: equal files are one version


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model to register: its files, and what they were made from and measured with."""

    name: str
    folder: Path  # exported
    digest: str  # of its files
    description: str
    alias: str | None = None
    run_id: str | None = None  # of the training; None: a new run
    dataset: str = ""  # name or URI
    fingerprint: str = ""  # of the dataset
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    params: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """A version in the registry."""

    name: str
    version: str
    model_id: str  # of the logged model
    run_id: str
    existed: bool  # these files were registered before


def find_version(uri: str, name: str, *, alias: str | None, version: str | None) -> str:
    """Return the source of a registered version, found by alias or by number.

    Raises:
        UserInputError: There is no such model, alias or version.
        InfrastructureError: The registry does not answer.
    """
    shown = f"models:/{name}" + (f"@{alias}" if alias else f"/{version}")
    try:
        client = _client(uri)
        found: Any = (
            client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, str(version))
        )
    except Exception as error:
        if not missing_on_server(error):
            raise _no_answer(uri, error) from None
        raise UserInputError(
            f"{shown} does not exist at {hide_passwords(uri)}: {_known(uri, name)}. Register one with "
            "`mfctl register RUN NAME --alias ALIAS`, or set MLFLOW_TRACKING_URI to another server"
        ) from None
    return str(found.source)


def _client(uri: str) -> Any:
    """Return a client that reports a server that does not answer instead of trying for minutes."""
    for variable, value in mlflow_tracker.MLFLOW_HTTP_ENV.items():
        os.environ.setdefault(variable, value)
    return mlflow_tracker.connect(uri)


def _known(uri: str, name: str) -> str:
    """Return the aliases of a registered model as text. Raises InfrastructureError if the registry does not answer."""
    try:
        model: Any = _client(uri).get_registered_model(name)
    except Exception as error:
        if not missing_on_server(error):
            raise _no_answer(uri, error) from None
        return f"there is no model {name}"
    aliases = ", ".join(f"{alias} (version {number})" for alias, number in sorted(model.aliases.items()))
    return f"{name} has the aliases {aliases}" if aliases else f"{name} has no alias"


def download_version(uri: str, source: str, folder: Path) -> Path:
    """Copy the files of a version below ``folder`` and return their folder.

    Raises InfrastructureError if the server or its artifact store does not answer.
    """
    try:
        return mlflow_tracker.download_artifacts(uri, source, folder)
    except Exception as error:
        raise _no_answer(uri, error) from None


def register_model(uri: str, record: ModelRecord) -> RegisteredVersion:
    """Upload the files as a logged model, register it as a version, and set the alias.

    A repeated call with equal files finds the version and sets the alias only, so an interrupted call is repeated. The
    alias is set last: until then it names the earlier version.

    Raises InfrastructureError if the server does not answer.
    """
    try:
        version = _find_equal(uri, record) or _create_version(uri, record)
        if record.alias:
            _client(uri).set_registered_model_alias(record.name, record.alias, version.version)
    except Exception as error:
        raise _no_answer(uri, error) from None
    return version


def _find_equal(uri: str, record: ModelRecord) -> RegisteredVersion | None:
    client = _client(uri)
    for found in client.search_model_versions(f"name='{record.name}'"):
        if found.tags.get(DIGEST_TAG) == record.digest:
            return RegisteredVersion(
                name=record.name,
                version=str(found.version),
                model_id=str(found.model_id or ""),
                run_id=str(found.run_id or ""),
                existed=True,
            )
    return None


def _create_version(uri: str, record: ModelRecord) -> RegisteredVersion:
    client = _client(uri)
    run_id = record.run_id
    if run_id is not None:
        try:
            client.get_run(run_id)
        except Exception as error:
            if not missing_on_server(error):
                raise
            run_id = None  # of another server
    if run_id is None:
        tracker = MlflowTracker(uri, experiment="models", name=record.name, tags={DIGEST_TAG: record.digest})
        tracker.finish()
        run_id = str(tracker.run_id)
    model_id = mlflow_tracker.log_model(
        client,
        run_id,
        name=record.name,
        folder=record.folder,
        params=record.params,
        tags={DIGEST_TAG: record.digest, "dataset": record.dataset, "fingerprint": record.fingerprint},
    )
    if record.fingerprint:
        mlflow_tracker.log_dataset(client, run_id, record.dataset, record.fingerprint, context="training")
    for held_out in (True, False):  # a sweep may have used other clips than those of the training dataset
        mlflow_tracker.log_model_metrics(
            client,
            run_id,
            model_id,
            {key: value for key, value in record.metrics.items() if key.startswith("validation/") == held_out},
            dataset=(record.dataset, record.fingerprint) if held_out else ("", ""),
            at=time.time(),
        )
    try:
        client.create_registered_model(record.name)
    except Exception as error:
        if not exists_on_server(error):
            raise
    made = client.create_model_version(
        record.name,
        source=f"models:/{model_id}",
        run_id=run_id,
        tags={DIGEST_TAG: record.digest},
        description=record.description,
        model_id=model_id,
    )
    return RegisteredVersion(
        name=record.name, version=str(made.version), model_id=model_id, run_id=run_id, existed=False
    )


def _no_answer(uri: str, error: Exception) -> InfrastructureError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return InfrastructureError(
        f"the registry at {hide_passwords(uri)} failed: {cause:.300}. Nothing local was changed. Check "
        "MLFLOW_TRACKING_URI and the server, then run the same command again"
    )
