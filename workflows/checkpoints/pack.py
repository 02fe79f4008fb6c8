"""Write a packaged model from a run: an exported folder with matrices in bfloat16.

    python -m workflows.checkpoints.pack RUN NAME --card CARD.yaml --results FOLDER/results.json

CARD.yaml has the fields of ``ModelCard`` that neither the run nor the sweep contains. The metrics are those of the
sweep at the mode and steps of its ``evaluation``, as means over noise seeds.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mfcore.errors import UserInputError
from workflows.checkpoints import card_sweep, packaged
from workflows.checkpoints.export import HubContent, check_publishable, narrow, write_hub_folder
from workflows.checkpoints.load import find_export, load_metadata, load_weights
from workflows.checkpoints.packaged import MAX_BYTES, ModelCard
from workflows.config import serialization


def pack_model(run: str | Path, folder: Path, *, card: Mapping[str, Any], results: Path | None = None) -> ModelCard:
    """Write the packaged model ``folder`` and return its card.

    Args:
        run: Run, checkpoint or export.
        folder: New or existing folder; its name is the name of the model.
        card: Fields of ``ModelCard`` except name, stage, parameters and metrics. ``world`` names the toy world of runs
            that do not record it.
        results: ``results.json`` of a sweep of this run.

    Raises:
        UserInputError: A field is missing or unknown, the sweep lacks the setting of the card, the model needs
            pretrained codec weights, or all models exceed ``MAX_BYTES``. Nothing is written.
    """
    fields = dict(card)
    world = fields.pop("world", None)
    export = find_export(run)
    metadata, weights = load_metadata(export), load_weights(export)
    check_publishable(metadata, run)
    metadata = replace(metadata, world=metadata.world or world)
    small = {name: narrow(weight, "bfloat16") for name, weight in weights.items()}
    facts = {
        "name": folder.name,
        "stage": metadata.stage,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "metrics": {},
        "dataset": metadata.dataset,
    }
    made = serialization.from_dict(ModelCard, fields | facts)
    if results is not None:
        if made.evaluation is None:
            raise UserInputError(f"{results}: the card has no evaluation, which names mode and steps. Add it")
        rows = card_sweep.read_rows(results)
        metrics = card_sweep.metrics_at(rows, made.evaluation, str(results))
        made = replace(made, metrics=metrics, sweep=card_sweep.frontier(rows))
    _check_size(folder, small)
    write_hub_folder(folder, HubContent(metadata=metadata, weights=small, card=made), replace=True)
    return made


def _check_size(folder: Path, weights: Mapping[str, Tensor]) -> None:
    others = [f for f in folder.parent.glob("*") if f.is_dir() and f != folder]
    total = sum(weight.nbytes for weight in weights.values()) + sum(packaged.folder_bytes(f) for f in others)
    if total > MAX_BYTES:
        raise UserInputError(f"{folder.parent} would have {total / 1e6:.1f} MB: use at most {MAX_BYTES / 1e6:g} MB")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and pack one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run, checkpoint or export")
    parser.add_argument("name", help="name of the model, such as toy-talker")
    parser.add_argument("--card", required=True, help="YAML file with the fields of the card")
    parser.add_argument("--results", type=Path, help="results.json of a sweep of the run")
    parser.add_argument("--models", type=Path, default=packaged.MODELS_DIR, help="folder of the packaged models")
    given = parser.parse_args(argv)
    try:
        packaged.check_name(given.name)
        card = pack_model(
            given.run, given.models / given.name, card=serialization.load_config_file(given.card), results=given.results
        )
    except UserInputError as error:
        parser.error(str(error))
    size = packaged.folder_bytes(given.models / given.name)
    print(f"{given.models / given.name}: {card.parameters} parameters, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
