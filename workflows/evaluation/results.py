import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows.evaluation.sweep import EvaluatedCheckpoint, Row
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

    def load_finished(self, key: str) -> dict[str, Any] | None:
        """What was stored under a key."""
        path = self._parts / f"{key}.json"
        return read_json(path) if path.exists() else None

    def save_finished(self, key: str, part: Mapping[str, Any]) -> None:
        """A setting's rows; its batches are needed no more."""
        self._parts.mkdir(parents=True, exist_ok=True)
        write_json(self._parts / f"{key}.json", {"scope": self.scope, "key": key, **part})
        for path in self._begun.glob(f"{key}-*.pickle"):
            path.unlink()

    def save_batch(self, key: str, batch: int, outcome: Any) -> None:
        """What one batch of a setting gave. Whole or not at all."""
        self._begun.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._begun / f"{key}-{batch}.pickle") as temporary:
            temporary.write_bytes(pickle.dumps(outcome))

    def load_batch(self, key: str, batch: int) -> Any | None:
        """The same, from an earlier run of this command in this folder."""
        path = self._begun / f"{key}-{batch}.pickle"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def load_all(self, subjects: Sequence[EvaluatedCheckpoint]) -> list[dict[str, Any]]:
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

    def write_summary(self, parts: Sequence[Mapping[str, Any]]) -> list[Row]:
        """``results.json``: the rows of all parts."""
        rows = [row for part in parts for row in part["rows"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        return rows
