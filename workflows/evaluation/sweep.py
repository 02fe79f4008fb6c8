"""Plan of a sweep: checkpoints and sampling settings."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, cast, get_args

from mfcore.errors import UserInputError
from mfcore.solver import Mode, SamplerName
from preprocessing.io.hashing import sha256_file
from workflows.checkpoints.load import WeightKind, find_export, load_metadata, locate_export, weight_files
from workflows.checkpoints.store import COMPLETE_FILE
from workflows.config.stage_names import Stage
from workflows.evaluation.rows import SettingColumns
from workflows.inference.precision import Precision
from workflows.inference.sampling import DEFAULT_FEW_SAMPLER, SamplingParams, resolve_sampling_params
from workflows.utils.json_io import read_json

METRICS_VERSION = 5  # increase it if a metric changes: stored rows are then recomputed


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """One checkpoint of a sweep."""

    path: str  # as given
    source: str  # path or URI of the checkpoint or export; of a run, that of the start of the sweep
    label: str  # short, for plots and file names
    stage: Stage
    digest: str  # hash of the weights
    precision: Precision = "fp32"  # of sampling


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One checkpoint with one setting of the sampling parameters."""

    checkpoint: EvaluatedCheckpoint
    params: SamplingParams

    @property
    def name(self) -> str:
        """Return the name of the setting for files and MLflow."""
        params = self.params
        guided = f"-w{params.guidance:g}" if params.guidance != 1 else ""
        seeded = f"-seed{params.seed}" if params.seed else ""
        is_default = params.mode != "few" or params.sampler == DEFAULT_FEW_SAMPLER
        sampler = "" if is_default else f"-{params.sampler}"
        return f"{self.checkpoint.label}-{params.mode}-{params.steps:02d}{sampler}{guided}{seeded}"

    def columns(self, workers: int) -> SettingColumns:
        """Return the columns of a result row that identify the setting."""
        params = self.params
        return {
            "checkpoint": self.checkpoint.path,
            "mode": params.mode,
            "steps": params.steps,
            "sampler": params.sampler,
            "nfe": params.num_function_evaluations,
            "guidance": params.guidance,
            "seed": params.seed,
            "precision": self.checkpoint.precision,
            "label": self.checkpoint.label,
            "workers": workers,
        }

    def key(self, scope: str) -> str:
        """Return the key of the stored rows; equal weights, clips and parameters give equal keys."""
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
        if params.sampler != "deterministic":  # keys of the deterministic sampler do not contain it
            parts = (*parts, params.sampler)
        if self.checkpoint.precision != "fp32":  # keys of fp32 do not contain it
            parts = (*parts, self.checkpoint.precision)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def identify_checkpoint(path: str, weights: WeightKind = "ema", precision: Precision = "fp32") -> EvaluatedCheckpoint:
    """Return stage, label and digest of a checkpoint. Raises ValueError if there is none."""
    source = locate_export(path)
    export = find_export(source)
    metadata = load_metadata(source)
    folder = Path(path)
    if folder.name == "export":
        folder = folder.parent
    label = f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    label = _safe_name(label) + ("" if precision == "fp32" else f"-{precision}")  # rows and plots are grouped by label
    return EvaluatedCheckpoint(
        path=path,
        source=source,
        label=label,
        stage=metadata.stage,
        digest=_digest(export, weights),
        precision=precision,
    )


def deduplicate_labels(checkpoints: Sequence[EvaluatedCheckpoint]) -> list[EvaluatedCheckpoint]:
    """Make labels unique: append the start of the digest where two checkpoints share a label.

    Equal weights with equal labels count once.
    """
    unique: dict[tuple[str, str], EvaluatedCheckpoint] = {}
    for checkpoint in checkpoints:
        unique.setdefault((checkpoint.label, checkpoint.digest), checkpoint)
    names = Counter(label for label, _ in unique)
    return [replace(s, label=f"{s.label}-{s.digest[:6]}") if names[s.label] > 1 else s for s in unique.values()]


def _safe_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _digest(export: Path, weights: WeightKind) -> str:
    """Return the hash of the weights, from the COMPLETE file if there is one: loading compares them with it."""
    files = weight_files(export, weights)
    marker = export.parent / COMPLETE_FILE
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
    samplers: Sequence[str] = (),
    seeds: Sequence[int],
) -> tuple[list[SweepPoint], list[str]]:
    """Return the valid sweep points, and a message for each combination that is skipped.

    ``guidance`` applies to the multi-step mode only, ``samplers`` to the few-step mode only; empty: the default.
    Raises ValueError for invalid values, or if no point is left.
    """
    known = get_args(Mode)
    if unknown := [m for m in modes if m not in known]:
        raise UserInputError(f"--modes {unknown[0]}: unknown mode. Use {' or '.join(known)}.")
    if unknown := [s for s in samplers if s not in get_args(SamplerName)]:
        raise UserInputError(f"--samplers {unknown[0]}: unknown sampler. Use {', '.join(get_args(SamplerName))}.")
    if any(not isfinite(w) for w in guidance):
        raise UserInputError(f"--guidance {list(guidance)}: weights must be finite. Use 1 for no guidance.")
    if not steps or min(steps) < 1:
        raise UserInputError(f"--steps {list(steps)}: step counts must be positive.")
    points, skipped = [], []
    for checkpoint in checkpoints:
        for mode in dict.fromkeys(modes):
            if mode == "few" and checkpoint.stage != "mutual":
                skipped.append(f"few-step mode of {checkpoint.label}: not trained in stage {checkpoint.stage}")
                continue
            weights = [1.0] if mode == "few" else list(dict.fromkeys(guidance)) or [None]
            ways = list(dict.fromkeys(samplers)) or [None] if mode == "few" else [None]
            for count, weight, sampler, seed in product(sorted(set(steps)), weights, ways, seeds):
                params = resolve_sampling_params(
                    checkpoint.stage,
                    mode=cast(Mode, mode),
                    steps=count,
                    guidance=weight,
                    trust=None,
                    seed=seed,
                    sampler=cast(SamplerName | None, sampler),
                )
                points.append(SweepPoint(checkpoint=checkpoint, params=params))
    if not points:
        raise UserInputError(
            f"nothing to evaluate: {'; '.join(skipped)}. Add multi to --modes, or use a mutual checkpoint."
        )
    return points, skipped
