"""Random kills of the processes of a run leave the dataset unchanged.

``MFCTL_KILLS=50 pytest -m slow tests/preprocessing/test_runner_kills.py`` kills as often as you like.
"""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.media_folder import write_clip
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

KILLS = int(os.environ.get("MFCTL_KILLS", "5"))
SEED = 20261121
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2, sizes=((128, 128),))
SETS = ("--set", "workers=2", "--set", "window_seconds=2", "--set", "sources_per_unit=2", "--sizes", "128x128")
ROOT = Path(__file__).parents[2]


class Driver:
    """A ``mfctl preprocess`` process and all processes that it started."""

    def __init__(self, media: Path, out: Path, scratch: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"}
        environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp", "MFCTL_CWD": str(out.parent)}
        command = [sys.executable, "-m", "workflows.cli", "preprocess", str(media), str(out), *SETS]
        self._log = (out.parent / "log.txt").open("a")
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)
        self.family: set[psutil.Process] = set()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Record children while their parents live; orphans get another parent."""
        root = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):  # a child that ends while it is looked at
                self.family.update(root.children(recursive=True))
            time.sleep(0.03)

    def victims(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            return [psutil.Process(self.process.pid)]
        return [p for p in list(self.family) if _is_kind(p, kind)]  # a copy: the watcher adds to it meanwhile

    def wait(self) -> int:
        code = self.process.wait()
        self._watcher.join()
        self._log.close()
        return code

    def survivors(self, seconds: float = 300) -> list[psutil.Process]:
        """Return the processes that remain; agents of Ray may exit a minute after the driver."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _is_kind(process: psutil.Process, kind: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and words[0].startswith("ray::Map" if kind == "worker" else "ffmpeg")


def kill_one(driver: Driver, kind: str, draw: random.Random) -> bool:
    """Kill a process of a kind; return False if the driver ended first."""
    while driver.process.poll() is None:
        if victims := driver.victims(kind):
            try:
                draw.choice(sorted(victims, key=lambda p: p.pid)).kill()
                return True
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.005)
    return False


def content(place: Path) -> dict[str, str]:
    files = (p for p in place.rglob("*") if p.is_file())
    return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def media(tmp_path) -> Path:
    """Write enough clips for all kills, and some that are rejected."""
    folder = tmp_path / "media"
    write_toyworld(folder, clips=2 + KILLS // 5, seconds=8, jobs=1)
    made = sorted(folder.glob("toy*.mp4"))
    for number in range(4 * KILLS):  # copies with different bytes
        source = made[number % len(made)]
        (folder / f"copy{number:03d}.mp4").write_bytes(source.read_bytes() + bytes([number // 256, number % 256]))
        if (words := source.with_suffix(".json")).exists():
            (folder / f"copy{number:03d}.json").write_bytes(words.read_bytes())
    write_clip(folder / "mute.mp4", 3.0, heard=False)
    (folder / "text.mp4").write_text("no media")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_kills_do_not_change_the_dataset(media, tmp_path):
    draw, struck = random.Random(SEED), []
    (tmp_path / "scratch").mkdir()
    out = tmp_path / "out"
    kinds = [("driver", "worker", "ffmpeg")[i % 3] for i in range(KILLS)]
    draw.shuffle(kinds)
    code = None
    while code != 0:
        driver = Driver(media, out, tmp_path / "scratch")
        while len(struck) < KILLS and driver.process.poll() is None:
            if not driver.family:  # it still reads its own code
                time.sleep(0.02)
                continue
            time.sleep(draw.uniform(0.0, 1.5))
            if kill_one(driver, kinds[len(struck)], draw):
                struck.append(kinds[len(struck)])
                if struck[-1] == "driver":
                    break
        code = driver.wait()
        assert code in (0, -9), (tmp_path / "log.txt").read_text()
        assert driver.survivors() == []
    assert len(struck) == KILLS, f"the job was done after {struck}"
    print(f"killed: {struck}")
    assert list((tmp_path / "scratch").glob("mfctl-*")) == []
    assert inspect_dataset(str(out), verify=True)["verified"]
    build_dataset([str(media)], str(tmp_path / "undisturbed"), CONFIG, progress=lambda *_: None)
    assert content(out) == content(tmp_path / "undisturbed")
