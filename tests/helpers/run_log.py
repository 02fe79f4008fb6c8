"""What a run has logged, read from its folder."""

import json
from pathlib import Path


def logged_steps(run: Path) -> list[int]:
    """Of the training's own lines, in their order; samples and what they score have lines of their own."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line["step"] for line in lines if "samples_seen" in line]
