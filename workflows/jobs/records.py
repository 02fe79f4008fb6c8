"""Records of submitted jobs and local heads."""

from dataclasses import dataclass
from pathlib import Path

from workflows.utils.environment import base_directory


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """Record of a submitted job, a file below ``runs/cluster/jobs``."""

    id: str
    address: str  # URL of the job server; for a RayJob the file
    command: list[str]
    submitted: float  # seconds since the epoch
    target: str = ""  # as given by the user; a cluster file gives a new tunnel, "" uses the address


def state_dir() -> Path:
    """Return the folder of the records of heads and jobs, below ``runs/``."""
    return base_directory() / "runs" / "cluster"
