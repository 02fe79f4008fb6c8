"""Workers: a repeated block of units processes only those without a marker."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from preprocessing import runner
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.units import plan_units
from preprocessing.io.lease import Lease
from preprocessing.io.storage import Store
from preprocessing.sources.discovery import find_sources

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=1)


def test_a_repeated_block_skips_finished_units(tmp_path, monkeypatch):
    """A worker died after two of three units of its block; the block is sent to another one."""
    for name in "abc":
        (tmp_path / f"{name}.mp4").write_text(f"no media {name}")
    store = Store(str(tmp_path / "out"))
    units = plan_units([], find_sources([str(tmp_path)]), 1, CONFIG.fingerprint)
    processed: list[str] = []
    real = runner.process_unit
    monkeypatch.setattr(
        runner, "process_unit", lambda unit, *rest, **more: processed.append(unit.name) or real(unit, *rest, **more)
    )
    with Lease(store) as lease:
        worker = runner._Worker(store.uri, lease.token, CONFIG)
        for unit in units[:2]:
            worker({"unit": unit.to_json()})
        store.write(units[1].marker, b"")
        results = [worker({"unit": unit.to_json()}) for unit in units]
    assert processed == [units[i].name for i in (0, 1, 1, 2)]
    assert [json.loads(result["marker"])["unit"] for result in results] == [unit.name for unit in units]


def test_a_worker_returns_warnings_about_its_sources(tmp_path):
    (tmp_path / "a.mp4").write_text("no media")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    store = Store(str(tmp_path / "out"))
    (unit,) = plan_units([], find_sources([str(tmp_path)]), 1, CONFIG.fingerprint)
    with Lease(store) as lease:
        result = runner._Worker(store.uri, lease.token, CONFIG)({"unit": unit.to_json()})
    assert json.loads(result["warnings"]) == [f"{tmp_path}/a.txt, row 1: characters that are not valid are replaced"]


@pytest.mark.slow
def test_files_reach_the_disk_before_their_marker(tmp_path):
    """Record system calls with strace: each file and its folder are flushed before the next rename."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    (tmp_path / "clips").write_bytes(b"rows")
    code = """if True:
        import sys
        from pathlib import Path
        from preprocessing.io.storage import Store
        store = Store(sys.argv[1] + "/out")
        store.upload(Path(sys.argv[1], "clips"), "clips/u.parquet")
        store.write("_done/u.json", b"{}")
        """
    log = tmp_path / "log"
    trace = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,rename,renameat,renameat2"]
    subprocess.run(
        [*trace, sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=100
    )
    calls = [line for line in log.read_text().splitlines() if str(tmp_path / "out") in line]
    kinds = ["rename" if "rename" in line else "file" if ".tmp-" in line else "folder" for line in calls]
    first, second = (i for i, kind in enumerate(kinds) if kind == "rename")
    assert kinds[first - 1] == "file"
    assert kinds[first + 1] == "folder"
    assert "/clips>" in calls[first + 1]
    assert kinds[second - 1] == "file"
    assert kinds[second + 1] == "folder"
    assert "/_done>" in calls[second + 1]
