"""Folder of ``mfctl bench gpu``: four files, each below 16 MB. Imports no torch.

=================  ==========================================================
``settings.json``  device and preset; other ones are rejected
``results.jsonl``  one line per case, written as soon as the case ends
``log.txt``        output of all parts, with tracebacks; the end of a long one
``summary.txt``    results as tables
=================  ==========================================================
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from workflows.utils.json_io import read_json, write_json

SETTINGS_FILE, RESULTS_FILE, LOG_FILE, SUMMARY_FILE = "settings.json", "results.jsonl", "log.txt", "summary.txt"
FILES = (SETTINGS_FILE, RESULTS_FILE, LOG_FILE, SUMMARY_FILE)
WHOLE_PART = ("process", "device")  # cases of lines about a whole part
MAX_FILE_BYTES = 15_000_000  # machines that lend a GPU return files up to 16 MiB
MAX_LINE_BYTES = 200_000


class ResultFolder:
    """Results of one command and of those that continue it."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Create or open the folder. Raises UserInputError if it holds something else."""
        self.path = path
        stored = path / SETTINGS_FILE
        if path.exists() and not path.is_dir():
            raise UserInputError(f"{path} is a file. --out must name a folder")
        if stored.exists():
            found = read_json(stored)
            if found != dict(settings):
                raise UserInputError(
                    f"{path} holds results with {_listed(found)}, and this command has {_listed(settings)}. Give the "
                    "same options, or another folder with --out"
                )
            return
        if path.exists() and any(path.iterdir()):
            raise UserInputError(f"{path} is not empty and holds no results: choose a new folder with --out")
        path.mkdir(parents=True, exist_ok=True)
        write_json(stored, dict(settings))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line to disk. A line or file that is too long keeps the names and loses the result."""
        line = json.dumps(record)
        target = self.path / RESULTS_FILE
        size = target.stat().st_size if target.exists() else 0
        if len(line) > MAX_LINE_BYTES or size + len(line) > MAX_FILE_BYTES:
            kept = {k: v for k, v in record.items() if k != "result"}
            line = json.dumps(kept | {"status": "failed", "reason": f"a result of {len(line)} bytes is too long"})
        with target.open("a+") as file:
            if size and not self._ends_with_newline(target):  # a line that was cut by a stopped machine
                file.write("\n")
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Return all lines. A line that was cut is left out."""
        target = self.path / RESULTS_FILE
        found: list[dict[str, Any]] = []
        for line in target.read_text(errors="replace").splitlines() if target.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
        return found

    def latest(self) -> list[dict[str, Any]]:
        """Return the latest line of every case, in the order of their first lines. Finished cases stay finished.

        A line about a whole part counts until the part runs again.
        """
        by_case: dict[tuple[str, str], dict[str, Any]] = {}
        for record in self.records():
            part, case = str(record.get("part")), str(record.get("case"))
            for whole in WHOLE_PART:
                by_case.pop((part, whole), None)
            if by_case.get((part, case), {}).get("status") != "done":
                by_case[part, case] = record
        return [r for r in by_case.values() if r.get("case") not in WHOLE_PART or r.get("status") != "done"]

    def limit_log(self) -> None:
        """Cut the start of a log that is too long."""
        target = self.path / LOG_FILE
        if target.exists() and target.stat().st_size > MAX_FILE_BYTES:
            with target.open("rb") as file:
                file.seek(-MAX_FILE_BYTES // 2, os.SEEK_END)
                kept = file.read()
            target.write_bytes(b"(start of the log removed)\n" + kept)

    def write_summary(self, text: str) -> None:
        """Replace the summary."""
        (self.path / SUMMARY_FILE).write_text(text + "\n")

    @staticmethod
    def _ends_with_newline(path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


def _listed(settings: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items()) if isinstance(settings, Mapping) else "other settings"
