"""Reader of a run's metrics."""

import json
from pathlib import Path


def logged_steps(run: Path) -> list[int]:
    """Return the steps of the training metrics in their order, without lines of samples."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["step"] for line in lines if "samples_seen" in line]
