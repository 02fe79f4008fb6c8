"""Write a checkpoint as an exported folder (``mfctl export``); packaged models use the same writer."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.weights import SHARD_BYTES, shard_weights
from workflows.checkpoints import card_sweep
from workflows.checkpoints.card_text import render_card
from workflows.checkpoints.hub_folder import HubFolderWriter, check_new_folder, is_hub_folder
from workflows.checkpoints.layout import (
    CARD_FILE,
    CARD_TEXT_FILE,
    HUB_WEIGHTS,
    INDEX_FILE,
    PLOT_FILE,
    RUN_FILE,
    TRAINING_FILE,
)
from workflows.checkpoints.load import WeightKind, find_export, load_metadata, load_weights, weight_files
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.packaged import ModelCard, read_card
from workflows.config import serialization
from workflows.utils.json_io import read_intact_json

Dtype = Literal["float32", "bfloat16"]
NOT_RECORDED = "not recorded"
UNKNOWN_LICENSE = "unknown"


@dataclass(frozen=True, kw_only=True)
class HubContent:
    """Everything that a folder contains."""

    metadata: ExportMetadata
    weights: Mapping[str, Tensor]
    card: ModelCard
    plot: Path | None = None
    training: Mapping[str, Any] | None = None  # configuration of the run


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    weights: WeightKind = "ema",
    dtype: Dtype = "float32",
    sweep: str | Path | None = None,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    hide_folders: bool = False,
) -> dict[str, Any]:
    """Write a new folder that ``from_pretrained`` and every CHECKPOINT argument load; return its facts.

    Args:
        checkpoint: Run, checkpoint, exported folder, packaged or registered model.
        folder: New or empty folder; its name becomes the name of the model.
        weights: EMA or last step.
        dtype: Of matrices in the file. Vectors stay in float32, and everything loads as float32.
        sweep: Folder of `mfctl evaluate` with results of these weights.
        card: Fields of the model card, such as summary, language, license and limits.
        license: SPDX id; overrides that of the card.
        hide_folders: Store the names of codec folders without their parents, for publication.

    Raises:
        UserInputError: The input is wrong or ``folder`` is not empty. Nothing is written.
    """
    target = Path(folder)
    check_new_folder(target)
    export = find_export(checkpoint)
    metadata, loaded = load_metadata(export), load_weights(export, weights)
    rows: list[dict[str, Any]] = []
    if sweep is not None:
        rows = card_sweep.rows_of_checkpoint(Path(sweep), weight_files(export, weights), str(checkpoint))
    record = read_intact_json(export.parent / RUN_FILE) or {}
    made = build_card(export, metadata, record, name=target.absolute().name, parameters=_count(loaded))
    if rows:
        setting = card_sweep.default_setting(rows, metadata.stage, made.name)
        found = card_sweep.metrics_at(rows, setting, str(sweep))
        made = replace(made, evaluation=setting, metrics=found, sweep=card_sweep.frontier(rows))
    given = dict(card or {}) | ({"license": license} if license else {})
    made = serialization.from_dict(ModelCard, serialization.to_dict(made) | given)
    if hide_folders:
        metadata = replace(metadata, folders={key: Path(path).name for key, path in metadata.folders.items()})
    plot = Path(sweep) / PLOT_FILE if sweep is not None else export / PLOT_FILE
    content = HubContent(
        metadata=metadata,
        weights={name: narrow(weight, dtype) for name, weight in loaded.items()},
        card=made,
        plot=plot if plot.is_file() else None,
        training=training_record(export, record),
    )
    write_hub_folder(target, content)
    return {
        "path": str(target),
        "files": sorted(file.name for file in target.iterdir()),
        "bytes": sum(file.stat().st_size for file in target.iterdir()),
        "stage": metadata.stage,
        "parameters": made.parameters,
        "license": made.license,
        "metrics": {name: metric.value for name, metric in made.metrics.items()},
    }


def write_hub_folder(
    folder: Path, content: HubContent, *, replace: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a whole folder or nothing. ``replace``: an existing folder is replaced, else it must be empty."""
    with HubFolderWriter(folder, replace=replace) as writer:
        shards = shard_weights(HUB_WEIGHTS, content.weights, shard_bytes)
        for name, part in shards.items():
            save_file(part, writer.folder / name, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(weight.nbytes for weight in content.weights.values())
            places = {key: name for name, part in shards.items() for key in part}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            writer.write_text(INDEX_FILE, json.dumps(index, indent=1) + "\n")
        if content.plot is not None:
            shutil.copyfile(content.plot, writer.folder / PLOT_FILE)
        if content.training:
            writer.write_text(TRAINING_FILE, json.dumps(content.training, indent=1) + "\n")
        writer.write_text(CARD_FILE, json.dumps(serialization.to_dict(content.card), indent=1) + "\n")
        writer.write_text(CARD_TEXT_FILE, render_card(content.card, has_plot=content.plot is not None))
        writer.write_config(serialization.to_dict(content.metadata))


def narrow(weight: Tensor, dtype: Dtype) -> Tensor:
    """Return a matrix in ``dtype``; vectors, such as norms and biases, stay in float32: they are small."""
    return (weight.to(torch.bfloat16) if dtype == "bfloat16" and weight.ndim > 1 else weight).contiguous()


def build_card(
    export: Path, metadata: ExportMetadata, record: Mapping[str, Any], *, name: str, parameters: int
) -> ModelCard:
    """Return the card that run and metadata give; that of an exported folder is taken over."""
    if is_hub_folder(export):
        return replace(read_card(export), name=name)
    what = "paired audio and video" if len(metadata.codecs) > 1 else next(iter(metadata.codecs))
    world = f" of the synthetic world {metadata.world}" if metadata.world else ""
    dataset = record.get("dataset", {})
    count = f"{dataset['clips']:,} clips" if "clips" in dataset else "Clips, their number is not recorded,"
    limits = ["Generated clips carry a mark in the metadata of the file."]
    if metadata.few_steps is not None:
        limits.append(f"The few-step mode is trained for at most {metadata.few_steps} steps per chunk.")
    if metadata.transcript == "phonemes":
        limits.append("Speech is English; text becomes English phonemes.")
    if metadata.folders:
        limits.append("Decoding needs the weights of the pretrained codecs; set MFCTL_CODECS to their folder.")
    return ModelCard(
        name=name,
        summary=f"Causal streaming model of {what} after stage {metadata.stage} of Mutual Forcing.",
        language="English" if metadata.transcript == "phonemes" else NOT_RECORDED,
        stage=metadata.stage,
        license=UNKNOWN_LICENSE,
        parameters=parameters,
        data=f"{count}{world}.",
        commands=tuple(filter(None, [record.get("command")])),
        limits=tuple(limits),
        metrics={},
        dataset=metadata.dataset,
        samples_seen=record.get("progress", {}).get("samples_seen"),
    )


def training_record(export: Path, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return stage, configuration and versions of the run, without paths of its machine; None if not recorded."""
    if is_hub_folder(export):
        return read_intact_json(export / TRAINING_FILE)
    found = {key: record[key] for key in ("stage", "config", "dataset", "versions", "git") if key in record}
    return found or None


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())


def check_publishable(metadata: ExportMetadata, checkpoint: str | Path) -> None:
    """Raise UserInputError if the codecs need folders of weights, which cannot be packed."""
    if metadata.folders:
        raise UserInputError(
            f"{checkpoint} needs codec weights in {', '.join(metadata.folders.values())}: they cannot be packed"
        )
