"""Datasets in S3 are repaired and resumed with few requests."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.io.storage import Store
from tests.helpers.finished_dataset import ONE_SOURCE_PER_UNIT, write_finished_dataset
from tests.helpers.media_folder import make_folder
from tests.helpers.object_store import BUCKET, count_requests, s3_server
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

pytestmark = pytest.mark.slow
PAGE = 50  # objects of a listing; 1,000 in S3
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=3)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """An S3 server with its access log, and a complete dataset."""

    log: Path
    media: Path
    files: dict[str, bytes]  # of the dataset


def quiet(*_: object) -> None: ...


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    folder = tmp_path_factory.mktemp("s3")
    make_folder(folder / "media")
    build_dataset([str(folder / "media")], str(folder / "out"), CONFIG, progress=quiet)
    paths = [path for path in (folder / "out").rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder / "out")): path.read_bytes() for path in paths}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(PAGE))
        with s3_server(folder / "log"):
            yield Bucket(log=folder / "log", media=folder / "media", files=files)


def content(store: Store) -> dict[str, str]:
    names = [*store.list_files("clips"), *store.list_files("rejects"), *store.list_files("_done")]
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in (*names, "_dataset.json")}


def expected(bucket: Bucket) -> dict[str, str]:
    names = (name for name in bucket.files if name != "_sources.parquet")
    return {name: hashlib.sha256(bucket.files[name]).hexdigest() for name in names}


@pytest.mark.parametrize("state", ["complete", "unfinished", "of an earlier version"])
@pytest.mark.parametrize("damage", ["lost", "cut", "damaged marker"])
def test_a_unit_that_lost_one_of_its_files_is_processed_again(bucket, state, damage, capsys):
    store = Store(f"s3://{BUCKET}/{state.replace(' ', '-')}-{damage.replace(' ', '-')}")
    for name, data in bucket.files.items():
        store.write(name, data)
    markers = {name: json.loads(data) for name, data in bucket.files.items() if name.startswith("_done/")}
    name, marker = next((name, marker) for name, marker in markers.items() if len(marker["files"]) > 1)
    broken = marker["files"][0]["name"]
    if damage == "lost":
        store.remove(broken)
    elif damage == "cut":
        store.write(broken, bucket.files[broken][:100])
    else:
        broken = name
        store.write(broken, b"no marker")
    metadata = json.loads(bucket.files["_dataset.json"])
    if state == "unfinished":
        metadata = metadata | {"complete": False}
    elif state == "of an earlier version":
        del metadata["files"]
    store.write("_dataset.json", json.dumps(metadata).encode())
    build_dataset([str(bucket.media)], store.uri, CONFIG, progress=quiet)
    assert broken in capsys.readouterr().err
    assert content(store) == expected(bucket)
    assert inspect_dataset(store.uri, verify=True)["verified"]


def requests(bucket: Bucket, media: Path, place: str) -> Counter[str]:
    """Return the requests of the same command again."""
    before = count_requests(bucket.log)
    build_dataset([str(media)], place, ONE_SOURCE_PER_UNIT, progress=quiet)
    return count_requests(bucket.log) - before


def test_requests_of_a_resume(bucket, tmp_path):
    """A complete dataset: a constant and one LIST per page of a folder. Else one GET per unit as well."""
    resumed: dict[tuple[int, bool], Counter[str]] = {}
    for units in (3, 20, 2 * PAGE + 20):
        place = f"s3://{BUCKET}/many{units}"
        write_finished_dataset(tmp_path / f"media{units}", place, units)
        resumed[units, True] = requests(bucket, tmp_path / f"media{units}", place)
        metadata = json.loads(Store(place).read("_dataset.json")) | {"complete": False}
        Store(place).write("_dataset.json", json.dumps(metadata).encode())
        if units < PAGE:
            resumed[units, False] = requests(bucket, tmp_path / f"media{units}", place)
    print({key: dict(value) for key, value in resumed.items()})
    assert resumed[3, True] == resumed[20, True]
    assert sum(resumed[20, True].values()) < 40
    assert resumed[2 * PAGE + 20, True] - resumed[20, True] == Counter(LIST=4), "more pages of rejects and of markers"
    assert resumed[20, False] - resumed[3, False] == Counter(GET=17), "one per marker"
    assert sum(resumed[3, False].values()) < 80
