"""Faults of an object store: a run completes or ends with an error, and can be resumed."""

import hashlib
import random
import threading
from dataclasses import replace
from fractions import Fraction

import fsspec
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.io import storage
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.lease import LOCK
from preprocessing.io.storage import Store
from tests.helpers.media_folder import make_folder, write_clip
from tests.helpers.object_store import BUCKET, FaultProxy, s3_at, s3_server
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

pytestmark = pytest.mark.slow
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)
MEDIA = f"s3://{BUCKET}/media"


def quiet(*_) -> None: ...


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Yield the port of an S3 server with five sources."""
    folder = tmp_path_factory.mktemp("faults")
    make_folder(folder / "media")
    with s3_server(folder / "log") as port:
        fsspec.filesystem("s3").put(f"{folder}/media/", f"{MEDIA}/", recursive=True)
        yield port


@pytest.fixture(scope="module")
def undisturbed(server) -> dict[str, str]:
    build_dataset([MEDIA], f"s3://{BUCKET}/undisturbed", CONFIG, progress=quiet)
    return content(f"s3://{BUCKET}/undisturbed")


def content(place: str) -> dict[str, str]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    root = place.removeprefix("s3://")
    return {path.removeprefix(root): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)}


class Faults:
    """Random faults of connections, at most three in a row."""

    def __init__(self, kinds: tuple[str, ...], share: float, seed: int = 1) -> None:
        self._draw, self._kinds, self._share, self._row = random.Random(seed), kinds, share, 0
        self._turn = threading.Lock()

    def __call__(self) -> str:
        with self._turn:
            bad = self._row < 3 and self._draw.random() < self._share
            self._row = self._row + 1 if bad else 0
            return self._draw.choice(self._kinds) if bad else ""


def test_run_with_connection_faults_equals_run_without(server, undisturbed, monkeypatch):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 2)
    kinds = ("refuse", "503", "silent", "torn up 100", "torn up 3000", "torn down 200", "torn down 5000")
    with FaultProxy(server, Faults(kinds, share=0.6)) as proxy:
        with s3_at(proxy.port):
            build_dataset([MEDIA], f"s3://{BUCKET}/bad-line", CONFIG, progress=quiet)
        assert all(proxy.seen[kind] for kind in ("refuse", "503", "torn up", "torn down")), proxy.seen
    assert content(f"s3://{BUCKET}/bad-line") == undisturbed


@pytest.mark.parametrize("kind", ["refuse", "503", "silent", "torn up 2000"])
def test_unavailable_store_ends_the_run_and_the_same_command_resumes(kind, server, undisturbed, monkeypatch):
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    place = f"s3://{BUCKET}/away-{kind.split()[0]}"
    broken = threading.Event()

    def after_a_unit(*_) -> None:
        broken.set()
        fsspec.filesystem("s3").clear_instance_cache()
        proxy.reset_all()

    with (
        FaultProxy(server, lambda: kind if broken.is_set() else "") as proxy,
        s3_at(proxy.port),
        pytest.raises(InfrastructureError, match="same command again"),
    ):
        build_dataset([MEDIA], place, CONFIG, progress=after_a_unit)
    there = content(place)
    assert all(undisturbed[name] == value for name, value in there.items() if name.startswith(("/clips", "/_done")))
    with s3_at(server):
        Store(place).remove(LOCK)  # or wait for a minute
        build_dataset([MEDIA], place, CONFIG, progress=quiet)
    assert content(place) == undisturbed


def test_missing_bucket_ends_the_run_and_the_same_command_resumes(server, tmp_path):
    for name, seconds in (("a", 2.2), ("b", 2.4)):
        write_clip(tmp_path / f"{name}.mp4", seconds)
    fs = fsspec.filesystem("s3")
    fs.mkdir("volatile")

    def vanish(*_) -> None:
        fs.invalidate_cache()
        fs.rm("volatile", recursive=True)

    run = ([str(tmp_path)], "s3://volatile/set", replace(CONFIG, sources_per_unit=1))
    with pytest.raises(InfrastructureError, match=r"(no such bucket|removed\?).*same command again"):
        build_dataset(*run, progress=vanish)
    fs.mkdir("volatile")
    assert build_dataset(*run, progress=quiet)["accepted"] == 2
    assert inspect_dataset("s3://volatile/set", verify=True)["verified"]
