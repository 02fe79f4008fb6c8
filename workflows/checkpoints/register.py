"""Register a checkpoint in the registry of MLflow (``mfctl register``)."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.io.hashing import sha256_file
from workflows.checkpoints.export import export_checkpoint
from workflows.checkpoints.layout import CARD_TEXT_FILE, CONFIG_FILE, RUN_FILE
from workflows.checkpoints.load import find_export, load_metadata
from workflows.checkpoints.packaged import read_card
from workflows.tracking.mlflow_tracker import mlflow_enabled
from workflows.tracking.registry import ModelRecord, register_model
from workflows.utils import environment
from workflows.utils.json_io import read_intact_json

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
_RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)  # of MLflow


def register_checkpoint(
    checkpoint: str, name: str, *, alias: str | None = None, sweep: str | None = None, license: str | None = None
) -> dict[str, Any]:
    """Export a checkpoint into the registry as a version of model ``name``, and return how to name it.

    Equal files are one version. The server is that of ``MLFLOW_TRACKING_URI``, by default runs/mlflow.db.

    Raises:
        UserInputError: The checkpoint, the name, the alias or the sweep is wrong.
        InfrastructureError: The registry does not answer. The same command can be repeated.
    """
    check_names(name, alias)
    if not mlflow_enabled():
        raise UserInputError("mfctl register: MLflow is not installed or switched off. Unset MFCTL_TRACKER")
    uri = environment.tracking_uri()
    export = find_export(checkpoint)
    metadata = load_metadata(export)
    record = read_intact_json(export.parent / RUN_FILE) or {}
    with tempfile.TemporaryDirectory(prefix="mfctl-register-") as temporary:
        folder = Path(temporary, name)
        facts = export_checkpoint(export, folder, sweep=sweep, license=license, hide_folders=True)
        card = read_card(folder)
        text = (folder / CARD_TEXT_FILE).read_text().split("---\n", 2)[-1]
        found = register_model(
            uri,
            ModelRecord(
                name=name,
                folder=folder,
                digest=sha256_file(folder / CONFIG_FILE),
                description=text[:4000],
                alias=alias,
                run_id=record.get("mlflow_run"),
                dataset=str(record.get("data") or metadata.dataset),
                fingerprint=metadata.dataset,
                metrics=facts["metrics"] | held_out_losses(record),
                params={"stage": metadata.stage, "parameters": str(card.parameters), "license": card.license},
            ),
        )
    return {
        "model": name,
        "version": found.version,
        "alias": alias,
        "checkpoint": f"models:/{name}@{alias}" if alias else f"models:/{name}/{found.version}",
        "model_id": found.model_id,
        "mlflow_run": found.run_id,
        "existed": found.existed,
        "tracking_uri": environment.hide_passwords(uri),
    }


def check_names(name: str, alias: str | None) -> None:
    """Raise UserInputError for a name or an alias that the registry does not take."""
    if not _NAME.fullmatch(name):
        raise UserInputError(f"{name!r} is not the name of a model. Use letters, digits, dots, hyphens and underscores")
    if alias is not None and (not _NAME.fullmatch(alias) or _RESERVED.fullmatch(alias)):
        raise UserInputError(
            f"--alias {alias!r} is not allowed. Use letters, digits and hyphens, such as champion; latest and v1 are "
            "reserved"
        )


def held_out_losses(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the last held-out losses of a checkpoint, as ``validation/NAME``."""
    return {f"validation/{key}": float(value) for key, value in record.get("progress", {}).get("last", {}).items()}
