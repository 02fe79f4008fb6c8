import json
import pickle
from collections.abc import Sequence
from pathlib import Path

from workflows.evaluation.rows import SettingResult, StoredSettingResult, SweepRow
from workflows.evaluation.sweep import EvaluatedCheckpoint
from workflows.evaluation.worker import TaskResult
from workflows.utils.json_io import atomic_path, read_json, write_json, write_text_atomically


def prepare_output_dir(folder: Path) -> None:
    """Make it an evaluation's. ValueError for one that holds something else: results would be written over it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).is_dir() for n in ("rows", "unfinished")):
        raise ValueError(f"--out {folder} is not empty and holds no evaluation: choose another folder")
    (folder / "rows").mkdir(parents=True, exist_ok=True)  # at once: the same command goes on wherever it is killed


class ResultStore:
    """The rows of a sweep's folder, and below them the batches of settings that are not finished."""

    def __init__(self, folder: Path, scope: str) -> None:
        self.folder, self.scope = folder, scope
        self._parts, self._begun = folder / "rows", folder / "unfinished"

    @property
    def path(self) -> Path:
        return self.folder / "results.json"

    def is_finished(self, key: str) -> bool:
        """Return True if the rows of a setting are stored."""
        return (self._parts / f"{key}.json").exists()

    def save_finished(self, key: str, result: SettingResult) -> None:
        """Write the rows of a setting and delete its batches."""
        self._parts.mkdir(parents=True, exist_ok=True)
        write_json(self._parts / f"{key}.json", {"scope": self.scope, "key": key, **result})
        for path in self._begun.glob(f"{key}-*.pickle"):
            path.unlink()

    def save_batch(self, key: str, batch: int, outcome: TaskResult) -> None:
        """What one batch of a setting gave. Whole or not at all."""
        self._begun.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._begun / f"{key}-{batch}.pickle") as temporary:
            temporary.write_bytes(pickle.dumps(outcome))

    def load_batch(self, key: str, batch: int) -> TaskResult | None:
        """The same, from an earlier run of this command in this folder."""
        path = self._begun / f"{key}-{batch}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def load_all(self, subjects: Sequence[EvaluatedCheckpoint]) -> list[StoredSettingResult]:
        """All that was measured in this folder, of these checkpoints, on these clips; cheapest first.

        They have the labels of ``subjects``: another sweep may have called them otherwise.
        """
        stored: list[StoredSettingResult] = [read_json(path) for path in sorted(self._parts.glob("*.json"))]
        labels = {(s.digest, s.precision): s.label for s in subjects}
        wanted = {"real", *(digest for digest, _ in labels)}
        results = [r for r in stored if r["scope"] == self.scope and r["digest"] in wanted]
        for result in results:
            first = result["rows"][0]
            if "precision" not in first:  # real clips
                continue
            label = labels.get((result["digest"], first["precision"]))
            if label is not None:
                result["name"] = label + result["name"].removeprefix(first["label"])
                for row in result["rows"]:
                    row["label"] = label
        return sorted(results, key=lambda r: (r["rows"][0]["nfe"], r["name"]))

    def write_summary(self, results: Sequence[SettingResult]) -> list[SweepRow]:
        """Write the rows of all settings to ``results.json`` and return them."""
        rows = [row for result in results for row in result["rows"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        return rows
