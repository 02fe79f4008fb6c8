from dataclasses import dataclass
from pathlib import Path

from workflows.utils.environment import base_directory


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A submitted job, as recorded under ``runs/cluster/jobs``."""

    id: str
    address: str  # of the job server; for a RayJob the file
    command: list[str]
    submitted: float  # seconds since the epoch
    target: str = ""  # as the user wrote it: a cluster file is connected to anew; "": by the address


def state_dir() -> Path:
    """Where heads and jobs are recorded, one folder for one ``runs/``."""
    return base_directory() / "runs" / "cluster"
