"""Jobs on a local head: they survive its loss, use object storage, and do not expose their keys."""

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
KEY, TOKEN = secrets.token_hex(16), secrets.token_hex(16)  # random, so that the packaged tree does not contain them
PREPROCESS = ("--set", "window_seconds=3", "--set", "sources_per_unit=1", "--set", "workers=2")


def sets(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


SHORT = sets("engine.kind=torch", "data.batch=4", "data.held_out=0.25", "eval_every=1000", "log_every=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the submitting folder with clips; stop its head at the end."""
    path = tmp_path_factory.mktemp("local")
    write_toyworld(path / "clips", clips=12, seconds=3, jobs=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}.items():
            patch.setenv(name, value)
        yield path
        finish(mfctl(path, "stop", "--head"))


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
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def kill_the_head_when(
    folder: Path, process: subprocess.Popen[str], happened: Callable[[], bool], part: str = ""
) -> str:
    """Kill all processes of the head, or those of one name; return the output of the submitting command."""
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
    output = finish(process, 1)
    assert time.monotonic() - killed < 300, "the submitting command ends"
    assert "does not respond" in output and "submit the same command again" in output, output
    assert "Traceback" not in output and "before the job was accepted" not in output, output
    return output


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_job_lost_with_its_head_resumes_when_submitted_again(folder: Path) -> None:
    words = ("submit", LOCAL, "--", "preprocess", "clips", "data", *PREPROCESS)
    kill_the_head_when(folder, mfctl(folder, *words), lambda: len(list(folder.glob("data/_done/*.json"))) >= 2)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("data/_done/*.json")}
    assert len(before) < 12, "killed before the end"
    finish(mfctl(folder, *words))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished units are not repeated"
    facts = inspect_dataset(str(folder / "data"), verify=True)
    assert (facts["sources"], facts["accepted"]) == (12, 12)

    more = sets("steps=150", "checkpoint.every=10")
    words = ("submit", LOCAL, "--", "train", "--stage", "audio", "--data", "data", "--run", "a", *SHORT, *more)
    kill_the_head_when(folder, mfctl(folder, *words), lambda: len(logged_steps(folder / "runs/a")) >= 25, "raylet")
    # the job server and the other processes of the head still run
    assert len(logged_steps(folder / "runs/a")) < 150, "killed before the end"
    output = finish(mfctl(folder, *words))
    assert "audio resumes at step" in output
    assert read_json(folder / "runs/a" / OUTCOME_FILE)["progress"]["step"] == 150
    assert logged_steps(folder / "runs/a") == list(range(151)), "every step exactly once"


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_jobs_use_object_storage_without_exposing_keys(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"[default]\naws_access_key_id = user\naws_secret_access_key = {KEY}\n")
    with s3_server(tmp_path / "log") as _, pytest.MonkeyPatch.context() as patch:
        fsspec.filesystem("s3").put(str(folder / "clips"), f"{BUCKET}/clips", recursive=True)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
        fsspec.filesystem("s3").clear_instance_cache()
        data = f"s3://{BUCKET}/data"
        output = finish(mfctl(folder, "submit", LOCAL, "--", "preprocess", f"s3://{BUCKET}/clips", data, *PREPROCESS))
        facts = inspect_dataset(data, verify=True)
        assert (facts["sources"], facts["accepted"]) == (12, 12)
        more = sets("steps=4", f"checkpoint.to=s3://{BUCKET}/runs")
        train = ("train", "--stage", "audio", "--data", data, "--run", "b", *SHORT, *more)
        output += finish(mfctl(folder, "submit", LOCAL, "--", *train))
        found = fsspec.filesystem("s3").glob(f"{BUCKET}/runs/b/checkpoints/*/COMPLETE")
        assert len(found) == 1 and not list(folder.glob("runs/b/checkpoints/*"))
    head = heads.load_record(folder / "runs/cluster/mfctl-local.json")
    assert head is not None
    written = [p for p in Path(head.temp).rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 2**24]
    assert len(written) > 50
    for secret in (KEY, TOKEN):
        assert secret not in output
        assert [path for path in written if secret.encode() in path.read_bytes()] == []


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_job_beyond_the_cluster_is_rejected_before_submission(folder: Path) -> None:
    train = ("train", "--stage", "audio", "--data", "data", *sets("engine.resource=trainer"))
    output = finish(mfctl(folder, "submit", LOCAL, "--", *train), code=2)
    assert "trainer 1" in output and "has room for 0" in output and "job raysubmit" not in output
