"""The same commands against S3: a real server process, to which fsspec speaks as it would to any other."""

import socket
import subprocess
import sys
import time
import urllib.request
from fractions import Fraction

import fsspec
import pytest
import torch

from preprocessing.config import PreprocessConfig
from preprocessing.reader import open_dataset
from preprocessing.toyworld import write_toyworld
from tests.workflows.test_train import SMALL, killed_at
from workflows.checkpoint import load_weights
from workflows.inspection import inspect
from workflows.preprocess import preprocess
from workflows.train import train
from workflows.training import worker

BUCKET = "s3://characters"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """An S3 server with one empty bucket; the environment names it, as it would name MinIO or Ceph."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    names = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "word"}
    names |= {"AWS_DEFAULT_REGION": "us-east-1"}
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        patch.setenv("MFCTL_TRACKER", "json")
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            _wait(url)
            fsspec.filesystem("s3").mkdir("characters")
            yield BUCKET
        finally:
            server.kill()
            server.wait()
            fsspec.filesystem("s3").clear_instance_cache()


def _wait(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def dataset(s3, tmp_path_factory) -> str:
    """Clips in a bucket, preprocessed into the bucket."""
    clips = tmp_path_factory.mktemp("clips")
    write_toyworld(clips, clips=4, seconds=2.6, jobs=1)
    (clips / "no media.mp4").write_text("a pointer")
    fsspec.filesystem("s3").put(f"{clips}/", f"{s3}/clips/", recursive=True)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    facts = preprocess([f"{s3}/clips/"], f"{s3}/data", config, progress=lambda *_: None)
    assert (facts["accepted"], facts["rejected"]) == (4, 1)
    return f"{s3}/data"


def test_a_dataset_in_a_bucket_is_the_one_on_disk(s3, dataset, tmp_path):
    inspect(dataset, verify=True)
    fsspec.filesystem("s3").get(f"{s3}/clips/", f"{tmp_path}/clips/", recursive=True)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    preprocess([f"{tmp_path}/clips"], f"{tmp_path}/data", config, progress=lambda *_: None)
    here, there = open_dataset(f"{tmp_path}/data"), open_dataset(dataset)
    mine, theirs = (sorted((d.clip(i) for i in range(len(d))), key=lambda c: c.source_uri[-12:]) for d in (here, there))
    assert len(mine) == len(theirs) == 4
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.audio, b.audio)
        assert b.source_uri.startswith("s3://")


def test_the_same_command_again_does_nothing_more(s3, dataset):
    before = fsspec.filesystem("s3").find(dataset)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    preprocess([f"{s3}/clips/"], dataset, config, progress=lambda *_: None)
    assert fsspec.filesystem("s3").find(dataset) == before


def test_a_run_whose_checkpoints_are_in_a_bucket_is_the_one_on_disk(s3, dataset, tmp_path, monkeypatch):
    """Killed and resumed, on a machine without a copy; two checkpoints are kept; the export loads by its URI."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sets = (*SMALL, "data.held_out=0.5", "checkpoint.keep=2")
    plain = train("video", data=dataset, sets=sets, run="v", runs_dir=tmp_path / "plain", launch=worker.work)
    away = {"data": dataset, "sets": (*sets, f"checkpoint.to={s3}/runs"), "run": "v", "runs_dir": tmp_path / "away"}
    with pytest.raises(KeyboardInterrupt):
        train("video", launch=killed_at(6), **away)
    result = train("video", launch=worker.work, **away)
    assert result["checkpoint"].startswith(f"{s3}/runs/v/checkpoints/")
    kept = fsspec.filesystem("s3").ls(f"{s3}/runs/v/checkpoints", refresh=True)
    assert len(kept) == 2
    assert not (tmp_path / "away" / "v" / "checkpoints").exists()
    before, after = load_weights(plain["run_dir"]), load_weights(result["checkpoint"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result["losses"] == plain["losses"]


def test_a_missing_bucket_is_one_clear_message(s3):
    with pytest.raises(ValueError, match=r"s3://nowhere"):
        open_dataset("s3://nowhere/data")
