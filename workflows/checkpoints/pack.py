"""Write a packaged model from a run: EMA weights with matrices in bfloat16, metadata and card.

    python -m workflows.checkpoints.pack RUN NAME --card CARD.yaml --results FOLDER/results.json

CARD.yaml has the fields of ``ModelCard`` that neither the run nor the sweep contains. The metrics are those of the
sweep at the mode and steps of its ``evaluation``, as means over noise seeds.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mfcore.errors import UserInputError
from workflows.checkpoints import packaged
from workflows.checkpoints.layout import METADATA_FILE
from workflows.checkpoints.load import find_export, load_metadata, load_weights
from workflows.checkpoints.packaged import CARD_FILE, CARD_TEXT_FILE, MAX_BYTES, WEIGHTS_FILE, CardMetric, ModelCard
from workflows.config import serialization
from workflows.utils.json_io import read_json, write_json

METRICS = (
    *(
        "sync",
        "viseme_sync",
        "valid",
        "identity_error",
        "syllable_error",
        "wer_pocketsphinx",
        "phoneme_accuracy",
        "seam",
    ),
    *("frechet", "motion_over_real", "sharpness_over_real", "loudness_db", "silence", "seconds_per_second"),
)
"""Metrics of a card, where the sweep has them."""


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
    if metadata.folders:
        raise UserInputError(
            f"{run} needs codec weights in {', '.join(metadata.folders.values())}: they cannot be packed"
        )
    metadata = replace(metadata, world=metadata.world or world)
    narrow = {name: to_bfloat16(weight) for name, weight in weights.items()}
    facts = {
        "name": folder.name,
        "stage": metadata.stage,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "metrics": {},
    }
    made = serialization.from_dict(ModelCard, fields | facts)
    if results is not None:
        made = replace(made, metrics=read_metrics(results, made))
    _check_size(folder, narrow)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(narrow, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files that only their owner can read
    write_json(folder / METADATA_FILE, serialization.to_dict(metadata))
    write_json(folder / CARD_FILE, serialization.to_dict(made))
    (folder / CARD_TEXT_FILE).write_text(render_card(made))
    return made


def to_bfloat16(weight: Tensor) -> Tensor:
    """Return a matrix in bfloat16; vectors, such as norms and biases, are unchanged: they are small."""
    return weight.to(torch.bfloat16).contiguous() if weight.ndim > 1 else weight.contiguous()


def _check_size(folder: Path, weights: Mapping[str, Tensor]) -> None:
    others = [f for f in folder.parent.glob("*") if f.is_dir() and f != folder]
    total = sum(weight.nbytes for weight in weights.values()) + sum(packaged.folder_bytes(f) for f in others)
    if total > MAX_BYTES:
        raise UserInputError(f"{folder.parent} would have {total / 1e6:.1f} MB: use at most {MAX_BYTES / 1e6:g} MB")


def read_metrics(results: Path, card: ModelCard) -> dict[str, CardMetric]:
    """Return the metrics of whole clips at the setting of the card, as means over the noise seeds of a sweep."""
    if card.evaluation is None:
        raise UserInputError(f"{results}: the card has no evaluation, which names mode and steps. Add it")
    rows: list[dict[str, Any]] = [row for row in read_json(results) if row["window"] == "all"]
    setting = (card.evaluation.mode, card.evaluation.steps)
    own = [row for row in rows if (row["mode"], row["steps"]) == setting]
    if not own:
        raise UserInputError(
            f"{results} has no row of mode {setting[0]} with {setting[1]} steps. Evaluate this setting"
        )
    real: dict[str, Any] = next((row["metrics"] for row in rows if row["mode"] == "real"), {})
    return {
        name: CardMetric(
            value=_mean([row["metrics"][name] for row in own]),
            real=real.get(name),
            low=_bound(own, name, "low"),
            high=_bound(own, name, "high"),
        )
        for name in METRICS
        if all(name in row["metrics"] for row in own)
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bound(rows: Sequence[Mapping[str, Any]], name: str, bound: str) -> float | None:
    values = [row["detail"].get(name, {}).get(bound) for row in rows]
    return None if None in values else _mean(values)


def render_card(card: ModelCard) -> str:
    """Return the card as Markdown."""
    commands = "\n".join(card.commands)
    lines = [
        f"# {card.name}\n\n{card.summary}\n",
        "| | |\n|-|-|",
        f"| language | {card.language} |",
        f"| stage | {card.stage} |",
        f"| parameters | {card.parameters / 1e6:.2f} million |",
        f"| training | {card.training_hours:g} hours on {card.training_machine} |",
        f"| license | {card.license} |",
        f"\n## Data\n\n{card.data}\n\n## Training\n\n```sh\n{commands}\n```",
    ]
    if card.metrics:
        rows = [
            f"| `{name}` | {_number(m.value)} | {_interval(m)} | {_number(m.real)} |"
            for name, m in card.metrics.items()
        ]
        lines += ["\n## Metrics\n\n| metric | model | 90% interval | real clips |\n|-|-|-|-|", *rows]
    if card.evaluation is not None:
        facts = card.evaluation
        setting = f"{facts.clips} held-out clips, {facts.seeds} noise seeds, mode {facts.mode}, {facts.steps} steps"
        commands = "\n".join(facts.commands)
        lines.append(f"\nReal clips are encoded and decoded. {setting}:\n\n```sh\n{commands}\n```")
    lines.append("\n## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits))
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _interval(metric: CardMetric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.3g} to {metric.high:.3g}"


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
