"""Storage of the results of a sweep."""

import json
from collections.abc import Sequence
from pathlib import Path

from mfcore.errors import UserInputError
from workflows.evaluation.batch_file import read_batch, write_batch
from workflows.evaluation.rows import SettingResult, StoredSettingResult, SweepRow
from workflows.evaluation.sweep import EvaluatedCheckpoint
from workflows.evaluation.worker import TaskResult
from workflows.utils.json_io import atomic_path, read_json, write_json, write_text_atomically


def prepare_output_dir(folder: Path) -> None:
    """Create the output folder. Raises ValueError if it contains something else than a sweep."""
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"--out {folder} is a file. Give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / n).is_dir() for n in ("rows", "unfinished")):
        raise UserInputError(f"--out {folder} is not empty and contains no sweep. Choose another folder.")
    (folder / "rows").mkdir(parents=True, exist_ok=True)  # now, so that a rerun recognizes the folder


class ResultStore:
    """Stores the rows of finished settings and the batches of unfinished ones."""

    def __init__(self, folder: Path, scope: str) -> None:
        self.folder = folder
        self.scope = scope
        self._finished = folder / "rows"
        self._unfinished = folder / "unfinished"

    @property
    def path(self) -> Path:
        """Return the path of the summary."""
        return self.folder / "results.json"

    def is_finished(self, key: str) -> bool:
        """Return True if the rows of a setting are stored."""
        return (self._finished / f"{key}.json").exists()

    def save_finished(self, key: str, result: SettingResult) -> None:
        """Write the rows of a setting and delete its batches."""
        self._finished.mkdir(parents=True, exist_ok=True)
        write_json(self._finished / f"{key}.json", {"scope": self.scope, "key": key, **result})
        for path in self._unfinished.glob(f"{key}-*"):
            path.unlink()

    def save_batch(self, key: str, batch: int, outcome: TaskResult) -> None:
        """Write the result of one batch atomically."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._unfinished / f"{key}-{batch}.safetensors") as temporary:
            write_batch(temporary, outcome)

    def load_batch(self, key: str, batch: int) -> TaskResult | None:
        """Return the result of one batch of an earlier run; None if it is not stored or cannot be read."""
        return read_batch(self._unfinished / f"{key}-{batch}.safetensors")

    def load_all(self, checkpoints: Sequence[EvaluatedCheckpoint]) -> list[StoredSettingResult]:
        """Return the results of the checkpoints on the clips of this scope, sorted by function evaluations.

        They get the labels of ``checkpoints``, since an earlier sweep may have used other labels.
        """
        stored: list[StoredSettingResult] = [read_json(path) for path in sorted(self._finished.glob("*.json"))]
        labels = {(s.digest, s.precision): s.label for s in checkpoints}
        wanted = {"real", *(digest for digest, _ in labels)}
        results = [r for r in stored if r["scope"] == self.scope and r["digest"] in wanted]
        for path in (Path(name) for result in results for name in result["samples"]):
            if path.is_absolute() or ".." in path.parts:
                raise UserInputError(
                    f"{self._finished} has a row that names the sample {str(path)!r}, outside of {self.folder}. "
                    "Remove the row"
                )
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
