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
from workflows.inference.precision import Precision
from workflows.inference.sampling import SamplingParams, resolve_sampling_params
from workflows.utils.json_io import read_json

METRICS_VERSION = 3  # raise when a metric changes its meaning: older rows are then measured again

Row = dict[str, Any]


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

    subject: EvaluatedCheckpoint
    how: SamplingParams

    @property
    def name(self) -> str:
        how = self.how
        guided = f"-w{how.guidance:g}" if how.guidance != 1 else ""
        seeded = f"-seed{how.seed}" if how.seed else ""
        return f"{self.subject.label}-{how.mode}-{how.steps:02d}{guided}{seeded}"

    @property
    def columns(self) -> Row:
        """The columns of a result row that name the setting."""
        how = self.how
        return {
            "checkpoint": self.subject.path,
            "mode": how.mode,
            "steps": how.steps,
            "nfe": how.num_function_evaluations,
            "guidance": how.guidance,
            "seed": how.seed,
            "precision": self.subject.precision,
        }

    def key(self, scope: str) -> str:
        """Of the file that holds its rows: the same weights, clips and settings give the same samples."""
        how = self.how
        parts = (scope, self.subject.digest, how.mode, how.steps, how.guidance, how.trust_label, how.seed)
        parts += () if self.subject.precision == "fp32" else (self.subject.precision,)  # files of old sweeps are fp32
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def identify_checkpoint(path: str, weights: WeightKind = "ema", precision: Precision = "fp32") -> EvaluatedCheckpoint:
    """A checkpoint's stage, name and digest. ValueError when there is none."""
    export, card = find_export(path), load_metadata(path)
    place = Path(path)
    if place.name == "export":
        place = place.parent
    label = f"{place.parent.parent.name}-{place.name}" if place.parent.name == "checkpoints" else place.name
    label = _plain(label) + ("" if precision == "fp32" else f"-{precision}")  # lines and plots go by it
    return EvaluatedCheckpoint(
        path=path, label=label, stage=card.stage, digest=_digest(export, weights), precision=precision
    )


def deduplicate_labels(subjects: Sequence[EvaluatedCheckpoint]) -> list[EvaluatedCheckpoint]:
    """With labels of their own: of those whose folders have the same name each gets the start of its digest. The same
    weights under one name are one subject."""
    found: dict[tuple[str, str], EvaluatedCheckpoint] = {}
    for subject in subjects:
        found.setdefault((subject.label, subject.digest), subject)
    names = Counter(label for label, _ in found)
    return [replace(s, label=f"{s.label}-{s.digest[:6]}") if names[s.label] > 1 else s for s in found.values()]


def _plain(label: str) -> str:
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
    subjects: Sequence[EvaluatedCheckpoint],
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
    if wrong := [m for m in modes if m not in known]:
        raise ValueError(f"unknown mode {wrong[0]!r}: --modes takes {', '.join(known)}")
    if any(not isfinite(w) for w in guidance):
        raise ValueError(f"--guidance {list(guidance)}: give finite weights; 1 is none")
    if not steps or min(steps) < 1:
        raise ValueError(f"--steps {list(steps)}: give whole numbers above 0")
    settings, skipped = [], []
    for subject in subjects:
        for mode in dict.fromkeys(modes):
            if mode == "few" and subject.stage != "mutual":
                skipped.append(f"few-step mode of {subject.label}: stage {subject.stage} has not trained it")
                continue
            weights = [1.0] if mode == "few" else list(dict.fromkeys(guidance)) or [None]
            for count, weight, seed in product(sorted(set(steps)), weights, seeds):
                how = resolve_sampling_params(
                    subject.stage, mode=cast(Mode, mode), steps=count, guidance=weight, trust=None, seed=seed
                )
                settings.append(SweepPoint(subject=subject, how=how))
    if not settings:
        raise ValueError(
            f"nothing to evaluate: {'; '.join(skipped)}. Add multi to --modes, or name a mutual checkpoint"
        )
    return settings, skipped
