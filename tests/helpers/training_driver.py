"""A training driver in a process of its own, for tests that kill it: ``python -m tests.helpers.training_driver JSON``.

Exit codes as the command line's: 0 done, 1 failed.
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
    """The same call again goes on with the same run, which is called ``a``."""
    words = {"stage": stage, "data": data, "runs_dir": str(runs_dir), "run": "a", "sets": list(sets), **more}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
    runs_dir.mkdir(parents=True, exist_ok=True)
    with (runs_dir / "driver.txt").open("a") as log:
        command = [sys.executable, "-m", "tests.helpers.training_driver", json.dumps(words)]
        return subprocess.Popen(command, cwd=runs_dir, env=environment, stdout=log, stderr=log, text=True)


def text(runs_dir: Path) -> str:
    """What the drivers said, their workers' log included."""
    return (runs_dir / "driver.txt").read_text()


def wait_for(runs_dir: Path, words: str, driver: subprocess.Popen[str], seconds: float = 300) -> float:
    """Until ``words`` stand in the log; the seconds it took."""
    begun = time.monotonic()
    while words not in text(runs_dir):
        assert driver.poll() is None, f"the driver ended before {words!r}:\n{text(runs_dir)}"
        assert time.monotonic() - begun < seconds, f"no {words!r} within {seconds} s:\n{text(runs_dir)}"
        time.sleep(0.01)
    return time.monotonic() - begun


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its Ray Train workers."""
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
