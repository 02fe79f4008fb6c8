"""What a sweep consists of, and what of it is already done: one small file per setting in the sweep's folder."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, cast, get_args

from mfcore.solver import Mode
from preprocessing.io.hashing import sha256_file
from workflows.checkpoints.load import WeightKind, find_export, load_metadata, weight_files
from workflows.checkpoints.store import COMPLETE_FILE
from workflows.config.stage_names import Stage
from workflows.evaluation.rows import SettingColumns
from workflows.inference.precision import Precision
from workflows.inference.sampling import SamplingParams, resolve_sampling_params
from workflows.utils.json_io import read_json

METRICS_VERSION = 3  # raise when a metric changes its meaning: older rows are then measured again


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """One checkpoint under test."""

    path: str  # as it was named
    label: str  # short, for plots and file names
    stage: Stage
    digest: str  # of its weights
    precision: Precision = "fp32"  # in which it makes samples


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One point of the frontier."""

    checkpoint: EvaluatedCheckpoint
    params: SamplingParams

    @property
    def name(self) -> str:
        params = self.params
        guided = f"-w{params.guidance:g}" if params.guidance != 1 else ""
        seeded = f"-seed{params.seed}" if params.seed else ""
        return f"{self.checkpoint.label}-{params.mode}-{params.steps:02d}{guided}{seeded}"

    def columns(self, workers: int) -> SettingColumns:
        """Return the columns of a result row that identify the setting."""
        params = self.params
        return {
            "checkpoint": self.checkpoint.path,
            "mode": params.mode,
            "steps": params.steps,
            "nfe": params.num_function_evaluations,
            "guidance": params.guidance,
            "seed": params.seed,
            "precision": self.checkpoint.precision,
            "label": self.checkpoint.label,
            "workers": workers,
        }

    def key(self, scope: str) -> str:
        """Of the file that holds its rows: the same weights, clips and settings give the same samples."""
        params = self.params
        parts = (
            scope,
            self.checkpoint.digest,
            params.mode,
            params.steps,
            params.guidance,
            params.trust_label,
            params.seed,
        )
        parts += (
            () if self.checkpoint.precision == "fp32" else (self.checkpoint.precision,)
        )  # keys of fp32 do not contain it
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def identify_checkpoint(path: str, weights: WeightKind = "ema", precision: Precision = "fp32") -> EvaluatedCheckpoint:
    """A checkpoint's stage, name and digest. ValueError when there is none."""
    export, metadata = find_export(path), load_metadata(path)
    folder = Path(path)
    if folder.name == "export":
        folder = folder.parent
    label = f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    label = _safe_name(label) + ("" if precision == "fp32" else f"-{precision}")  # lines and plots go by it
    return EvaluatedCheckpoint(
        path=path, label=label, stage=metadata.stage, digest=_digest(export, weights), precision=precision
    )


def deduplicate_labels(checkpoints: Sequence[EvaluatedCheckpoint]) -> list[EvaluatedCheckpoint]:
    """With labels of their own: of those whose folders have the same name each gets the start of its digest. The same
    weights under one name are one subject."""
    unique: dict[tuple[str, str], EvaluatedCheckpoint] = {}
    for checkpoint in checkpoints:
        unique.setdefault((checkpoint.label, checkpoint.digest), checkpoint)
    names = Counter(label for label, _ in unique)
    return [replace(s, label=f"{s.label}-{s.digest[:6]}") if names[s.label] > 1 else s for s in unique.values()]


def _safe_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _digest(export: Path, weights: WeightKind) -> str:
    """Taken from COMPLETE where it stands beside the export: weights may be large."""
    files, marker = weight_files(export, weights), export.parent / COMPLETE_FILE
    if marker.exists():
        known = cast(Mapping[str, Any], read_json(marker)["files"])
        digests = [str(known[f"export/{file.name}"]["sha256"]) for file in files]
    else:
        digests = [sha256_file(file) for file in files]
    return digests[0][:16] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def plan_sweep(
    checkpoints: Sequence[EvaluatedCheckpoint],
    *,
    modes: Sequence[str],
    steps: Sequence[int],
    guidance: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[SweepPoint], list[str]]:
    """The settings that make sense, cheapest first, and a line for each combination that is left out.

    ``guidance`` holds the multi-step mode's weights, none: the default; the few-step mode has it built in. ValueError
    when nothing is left.
    """
    known = get_args(Mode)
    if unknown := [m for m in modes if m not in known]:
        raise ValueError(f"unknown mode {unknown[0]!r}: --modes takes {', '.join(known)}")
    if any(not isfinite(w) for w in guidance):
        raise ValueError(f"--guidance {list(guidance)}: give finite weights; 1 is none")
    if not steps or min(steps) < 1:
        raise ValueError(f"--steps {list(steps)}: give whole numbers above 0")
    points, skipped = [], []
    for checkpoint in checkpoints:
        for mode in dict.fromkeys(modes):
            if mode == "few" and checkpoint.stage != "mutual":
                skipped.append(f"few-step mode of {checkpoint.label}: stage {checkpoint.stage} has not trained it")
                continue
            weights = [1.0] if mode == "few" else list(dict.fromkeys(guidance)) or [None]
            for count, weight, seed in product(sorted(set(steps)), weights, seeds):
                params = resolve_sampling_params(
                    checkpoint.stage, mode=cast(Mode, mode), steps=count, guidance=weight, trust=None, seed=seed
                )
                points.append(SweepPoint(checkpoint=checkpoint, params=params))
    if not points:
        raise ValueError(
            f"nothing to evaluate: {'; '.join(skipped)}. Add multi to --modes, or name a mutual checkpoint"
        )
    return points, skipped
