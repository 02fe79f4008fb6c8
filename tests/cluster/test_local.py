"""Jobs on a head of this machine: they outlive it, work in object storage, and nobody sees the keys they use."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import psutil
import pytest

from preprocessing.toyworld.world import write_toyworld
from tests.helpers.object_store import BUCKET, s3_server
from tests.helpers.run_log import logged_steps
from workflows.checkpoints.layout import OUTCOME_FILE
from workflows.data.inspect import inspect_dataset
from workflows.jobs import local_head as heads
from workflows.utils.json_io import read_json

ROOT = Path(__file__).resolve().parents[2]
LOCAL = str(ROOT / "cluster" / "local.yaml")
KEY, TOKEN = secrets.token_hex(16), secrets.token_hex(16)  # not written here: no tree that holds them travels
PREPROCESS = ("--set", "window_seconds=3", "--set", "sources_per_unit=1", "--set", "workers=2")


def sets(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


SHORT = sets("engine.kind=torch", "data.batch=4", "data.held_out=0.25", "eval_every=1000", "log_every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where commands are typed, with clips; the head they start is stopped in the end."""
    place = tmp_path_factory.mktemp("local")
    write_toyworld(place / "clips", clips=12, seconds=3, jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}.items():
            patch.setenv(name, value)
        yield place
        finish(mfctl(place, "stop", "--head"))


def mfctl(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workflows.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate()
    assert process.returncode == code, said
    return said


def kill_the_head_when(
    folder: Path, process: subprocess.Popen[str], happened: Callable[[], bool], part: str = ""
) -> str:
    """Every process of it at once, its jobs and their workers included, or only one part; what the follower says."""
    while not happened():
        assert process.poll() is None, finish(process, 1)
        time.sleep(0.1)
    head = heads.load_record(folder / "runs/cluster/mfctl-local.json")
    assert head is not None
    for one in heads.head_processes(head.temp):
        with suppress(psutil.NoSuchProcess):
            if one.pid != process.pid and part in ("", one.name()):
                one.kill()
    killed = time.monotonic()
    said = finish(process, 1)
    assert time.monotonic() - killed < 300, "it does not wait for ever"
    assert "no longer answers" in said and "submit the same command again" in said, said
    assert "Traceback" not in said and "before it had taken the job" not in said, said
    return said


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_job_that_dies_with_its_head_goes_on_when_it_is_submitted_again(folder: Path) -> None:
    words = ("submit", LOCAL, "--", "preprocess", "clips", "data", *PREPROCESS)
    kill_the_head_when(folder, mfctl(folder, *words), lambda: len(list(folder.glob("data/_done/*.json"))) >= 2)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("data/_done/*.json")}
    assert len(before) < 12, "killed in the middle"
    finish(mfctl(folder, *words))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"
    facts = inspect_dataset(str(folder / "data"), verify=True)
    assert (facts["sources"], facts["accepted"]) == (12, 12)

    more = sets("steps=150", "checkpoint.every=10")
    words = ("submit", LOCAL, "--", "train", "--stage", "audio", "--data", "data", "--run", "a", *SHORT, *more)
    kill_the_head_when(folder, mfctl(folder, *words), lambda: len(logged_steps(folder / "runs/a")) >= 25, "raylet")
    # the job server and all else of the head has stayed
    assert len(logged_steps(folder / "runs/a")) < 150, "killed in the middle"
    said = finish(mfctl(folder, *words))
    assert "audio resumes at step" in said
    assert read_json(folder / "runs/a" / OUTCOME_FILE)["progress"]["step"] == 150
    assert logged_steps(folder / "runs/a") == list(range(151)), "every step, and once"


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_jobs_work_in_object_storage_with_keys_that_nobody_sees(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"[default]\naws_access_key_id = user\naws_secret_access_key = {KEY}\n")
    with s3_server(tmp_path / "log") as _, pytest.MonkeyPatch.context() as patch:
        fsspec.filesystem("s3").put(str(folder / "clips"), f"{BUCKET}/clips", recursive=True)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
        fsspec.filesystem("s3").clear_instance_cache()
        data = f"s3://{BUCKET}/data"
        said = finish(mfctl(folder, "submit", LOCAL, "--", "preprocess", f"s3://{BUCKET}/clips", data, *PREPROCESS))
        facts = inspect_dataset(data, verify=True)
        assert (facts["sources"], facts["accepted"]) == (12, 12)
        more = sets("steps=4", f"checkpoint.to=s3://{BUCKET}/runs")
        train = ("train", "--stage", "audio", "--data", data, "--run", "b", *SHORT, *more)
        said += finish(mfctl(folder, "submit", LOCAL, "--", *train))
        found = fsspec.filesystem("s3").glob(f"{BUCKET}/runs/b/checkpoints/*/COMPLETE")
        assert len(found) == 1 and not list(folder.glob("runs/b/checkpoints/*"))
    head = heads.load_record(folder / "runs/cluster/mfctl-local.json")
    assert head is not None
    written = [p for p in Path(head.temp).rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 2**24]
    assert len(written) > 50
    for secret in (KEY, TOKEN):
        assert secret not in said
        assert [path for path in written if secret.encode() in path.read_bytes()] == []


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_what_a_running_cluster_never_has_is_refused_before_the_job(folder: Path) -> None:
    train = ("train", "--stage", "audio", "--data", "data", *sets("engine.resource=trainer"))
    said = finish(mfctl(folder, "submit", LOCAL, "--", *train), code=2)
    assert "trainer 1" in said and "has room for 0" in said and "job raysubmit" not in said
