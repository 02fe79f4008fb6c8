"""Metrics of a model card, from the results of a sweep (``mfctl evaluate``)."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from workflows.checkpoints.packaged import CardEvaluation, CardMetric, CardPoint
from workflows.checkpoints.store import file_digest
from workflows.utils.json_io import read_json

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
Row = Mapping[str, Any]


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Return the rows of whole clips. Raises UserInputError for a file that is not that of a sweep."""
    try:
        return [row for row in read_json(results) if row["window"] == "all"]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserInputError(f"{results} cannot be read. Name the folder of a finished `mfctl evaluate`") from None


def rows_of_checkpoint(sweep: Path, weights: Sequence[Path], shown: str) -> list[dict[str, Any]]:
    """Return the rows of a checkpoint and of real clips in the folder of a sweep.

    Raises UserInputError if the sweep has no row of these weights.
    """
    rows = read_rows(sweep / "results.json")
    digests = [file_digest(file) for file in weights]
    own = digests[0][:16] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
    stored: list[dict[str, Any]] = [read_json(file) for file in sorted((sweep / "rows").glob("*.json"))]
    labels = {result["rows"][0]["label"] for result in stored if result["digest"] == own}
    found = [row for row in rows if row["label"] in labels]
    if not found:
        known = ", ".join(sorted({str(row["checkpoint"]) for row in rows if row["mode"] != "real"}))
        raise UserInputError(
            f"--sweep {sweep}: it has no results of the weights of {shown}, only of {known or 'none'}. Evaluate this "
            "checkpoint, or name another sweep"
        )
    return [*found, *(row for row in rows if row["mode"] == "real")]


def default_setting(rows: Sequence[Row], stage: str, shown: str) -> CardEvaluation:
    """Return the setting for the metrics of a card: that of ``mfctl generate``, or the one with the most steps."""
    own = [row for row in rows if row["mode"] != "real"]
    wanted = ("few", 4) if stage == "mutual" else ("multi", 50)
    settings = sorted(
        {(row["mode"], row["steps"]) for row in own}, key=lambda s: (s != wanted, s[0] != wanted[0], -s[1])
    )
    mode, steps = settings[0]
    seeds = {row["seed"] for row in own}
    command = f"mfctl evaluate {shown} --data DATASET --modes {mode} --steps {steps} --clips {own[0]['clips']}"
    return CardEvaluation(
        commands=(f"{command} --seeds {len(seeds)}",), clips=own[0]["clips"], mode=mode, steps=steps, seeds=len(seeds)
    )


def metrics_at(rows: Sequence[Row], setting: CardEvaluation, source: str) -> dict[str, CardMetric]:
    """Return the metrics of whole clips at one setting, as means over the noise seeds of a sweep."""
    own = [row for row in rows if (row["mode"], row["steps"]) == (setting.mode, setting.steps)]
    if not own:
        raise UserInputError(
            f"{source} has no row of mode {setting.mode} with {setting.steps} steps. Evaluate this setting"
        )
    real: Mapping[str, Any] = next((row["metrics"] for row in rows if row["mode"] == "real"), {})
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


def frontier(rows: Sequence[Row]) -> tuple[CardPoint, ...]:
    """Return the settings of a sweep by mode and evaluations, as means over noise seeds."""
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["mode"] != "real":
            groups.setdefault((row["mode"], row["nfe"], row["steps"]), []).append(row)
    return tuple(
        CardPoint(
            mode=mode,
            steps=steps,
            nfe=nfe,
            metrics={
                name: _mean([row["metrics"][name] for row in group])
                for name in METRICS
                if all(name in row["metrics"] for row in group)
            },
        )
        for (mode, nfe, steps), group in sorted(groups.items())
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bound(rows: Sequence[Row], name: str, bound: str) -> float | None:
    values = [row["detail"].get(name, {}).get(bound) for row in rows]
    return None if None in values else _mean(values)
