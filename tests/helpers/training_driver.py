"""Training driver in a separate process, for tests that kill it: ``python -m tests.helpers.training_driver JSON``.

Exit codes as on the command line: 0 success, 1 failure.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def start(stage: str, *, data: str, runs_dir: Path, sets: Sequence[str], **more: object) -> subprocess.Popen[str]:
    """Start the driver of the run ``a``; the same call again resumes it."""
    arguments = {"stage": stage, "data": data, "runs_dir": str(runs_dir), "run": "a", "sets": list(sets), **more}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
    runs_dir.mkdir(parents=True, exist_ok=True)
    with (runs_dir / "driver.txt").open("a") as log:
        command = [sys.executable, "-m", "tests.helpers.training_driver", json.dumps(arguments)]
        return subprocess.Popen(command, cwd=runs_dir, env=environment, stdout=log, stderr=log, text=True)


def text(runs_dir: Path) -> str:
    """Return the output of the drivers, with the log of their workers."""
    return (runs_dir / "driver.txt").read_text()


def wait_for(runs_dir: Path, expected: str, driver: subprocess.Popen[str], seconds: float = 300) -> float:
    """Wait until ``expected`` is in the output; return the seconds."""
    start_time = time.monotonic()
    while expected not in text(runs_dir):
        assert driver.poll() is None, f"the driver ended before {expected!r}:\n{text(runs_dir)}"
        assert time.monotonic() - start_time < seconds, f"no {expected!r} within {seconds} s:\n{text(runs_dir)}"
        time.sleep(0.01)
    return time.monotonic() - start_time


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the Ray Train workers of a driver."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]


def main() -> int:
    from workflows.training.train import train_stage

    try:
        train_stage(**json.loads(sys.argv[1]))
    except RuntimeError as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
