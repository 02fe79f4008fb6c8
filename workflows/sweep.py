"""What a sweep consists of, and what of it is already done: one small file per setting in the sweep's folder."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, cast, get_args

from mfcore.steps import Mode
from workflows.checkpoint import COMPLETE, Weights, find_export, load_card, read_json, weight_files, write_json
from workflows.config import Stage
from workflows.generate import sampling
from workflows.precision import Precision
from workflows.streamer import Sampling

SCORER = 3  # raise when a metric changes its meaning: older rows are then measured again

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One checkpoint under test."""

    path: str  # as it was named
    label: str  # short, for plots and file names
    stage: Stage
    digest: str  # of its weights
    precision: Precision = "fp32"  # in which it makes samples


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the frontier."""

    subject: Subject
    how: Sampling

    @property
    def name(self) -> str:
        how = self.how
        guided = f"-w{how.guidance:g}" if how.guidance != 1 else ""
        seeded = f"-seed{how.seed}" if how.seed else ""
        return f"{self.subject.label}-{how.mode}-{how.steps:02d}{guided}{seeded}"

    @property
    def facts(self) -> Row:
        """The columns of a result row that name the setting."""
        how = self.how
        return {
            "checkpoint": self.subject.path,
            "mode": how.mode,
            "steps": how.steps,
            "nfe": how.nfe,
            "guidance": how.guidance,
            "seed": how.seed,
            "precision": self.subject.precision,
        }

    def key(self, scope: str) -> str:
        """Of the file that holds its rows: the same weights, clips and settings give the same samples."""
        how = self.how
        parts = (scope, self.subject.digest, how.mode, how.steps, how.guidance, how.label, how.seed)
        parts += () if self.subject.precision == "fp32" else (self.subject.precision,)  # files of old sweeps are fp32
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def examine(path: str, weights: Weights = "ema", precision: Precision = "fp32") -> Subject:
    """A checkpoint's stage, name and digest. ValueError when there is none."""
    export, card = find_export(path), load_card(path)
    place = Path(path)
    if place.name == "export":
        place = place.parent
    label = f"{place.parent.parent.name}-{place.name}" if place.parent.name == "checkpoints" else place.name
    label = _plain(label) + ("" if precision == "fp32" else f"-{precision}")  # lines and plots go by it
    return Subject(path=path, label=label, stage=card.stage, digest=_digest(export, weights), precision=precision)


def told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """With labels of their own: of those whose folders have the same name each gets the start of its digest. The same
    weights under one name are one subject."""
    found: dict[tuple[str, str], Subject] = {}
    for subject in subjects:
        found.setdefault((subject.label, subject.digest), subject)
    names = Counter(label for label, _ in found)
    return [replace(s, label=f"{s.label}-{s.digest[:6]}") if names[s.label] > 1 else s for s in found.values()]


def _plain(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def _digest(export: Path, weights: Weights) -> str:
    """Taken from COMPLETE where it stands beside the export: weights may be large."""
    files, marker = weight_files(export, weights), export.parent / COMPLETE
    if marker.exists():
        known = cast(Mapping[str, Any], read_json(marker)["files"])
        digests = [str(known[f"export/{file.name}"]["sha256"]) for file in files]
    else:
        digests = [_sha256(file) for file in files]
    return digests[0][:16] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan(
    subjects: Sequence[Subject],
    modes: Sequence[str],
    steps: Sequence[int],
    guidance: Sequence[float],
    seeds: Sequence[int],
) -> tuple[list[Setting], list[str]]:
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
                how = sampling(
                    subject.stage, mode=cast(Mode, mode), steps=count, guidance=weight, trust=None, seed=seed
                )
                settings.append(Setting(subject=subject, how=how))
    if not settings:
        raise ValueError(
            f"nothing to evaluate: {'; '.join(skipped)}. Add multi to --modes, or name a mutual checkpoint"
        )
    return settings, skipped


def claim_folder(folder: Path) -> None:
    """Make it an evaluation's. ValueError for one that holds something else: results would be written over it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).is_dir() for n in ("rows", "unfinished")):
        raise ValueError(f"--out {folder} is not empty and holds no evaluation: choose another folder")
    (folder / "rows").mkdir(parents=True, exist_ok=True)  # at once: the same command goes on wherever it is killed


class Results:
    """The rows of a sweep's folder, and below them the batches of settings that are not finished."""

    def __init__(self, folder: Path, scope: str) -> None:
        self.folder, self.scope = folder, scope
        self._parts, self._begun = folder / "rows", folder / "unfinished"

    @property
    def path(self) -> Path:
        return self.folder / "results.json"

    def done(self, key: str) -> dict[str, Any] | None:
        """What was stored under a key."""
        path = self._parts / f"{key}.json"
        return read_json(path) if path.exists() else None

    def store(self, key: str, part: Mapping[str, Any]) -> None:
        """A setting's rows; its batches are needed no more."""
        self._parts.mkdir(parents=True, exist_ok=True)
        write_json(self._parts / f"{key}.json", {"scope": self.scope, "key": key, **part})
        for path in self._begun.glob(f"{key}-*.pickle"):
            path.unlink()

    def keep(self, key: str, batch: int, outcome: Any) -> None:
        """What one batch of a setting gave. Whole or not at all."""
        self._begun.mkdir(parents=True, exist_ok=True)
        temporary = self._begun / f".tmp-{key}-{batch}"
        temporary.write_bytes(pickle.dumps(outcome))
        temporary.replace(self._begun / f"{key}-{batch}.pickle")

    def kept(self, key: str, batch: int) -> Any | None:
        """The same, from an earlier run of this command in this folder."""
        path = self._begun / f"{key}-{batch}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def parts(self, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
        """All that was measured in this folder, of these checkpoints, on these clips; cheapest first.

        They have the labels of ``subjects``: another sweep may have called them otherwise.
        """
        found = [read_json(path) for path in sorted(self._parts.glob("*.json"))]
        labels: dict[tuple[str, str], str] = {(s.digest, s.precision): s.label for s in subjects}
        wanted = {"real", *(digest for digest, _ in labels)}
        mine = [p for p in found if p["scope"] == self.scope and p["digest"] in wanted]
        for part in mine:
            first = part["rows"][0]
            label, before = labels.get((part["digest"], first.get("precision", "fp32"))), first["label"]
            if label is not None and label != before:
                part["name"] = label + part["name"].removeprefix(before)
                part["rows"] = [row | {"label": label} for row in part["rows"]]
        return sorted(mine, key=lambda p: (p["rows"][0]["nfe"], p["name"]))

    def write(self, parts: Sequence[Mapping[str, Any]]) -> list[Row]:
        """``results.json``: the rows of all parts."""
        rows = [row for part in parts for row in part["rows"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        temporary.replace(self.path)
        return rows
