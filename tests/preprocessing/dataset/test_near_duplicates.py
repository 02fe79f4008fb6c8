"""Near-duplicates: copies are found; other characters and other spans are not."""

import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.dataset import near_duplicates
from preprocessing.dataset.near_duplicates import DUPLICATES, find_pairs, similarity
from preprocessing.dataset.reader import open_dataset
from preprocessing.io.storage import Store
from preprocessing.toyworld.world import write_toyworld
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=3)
COPIES = {
    "reencoded.mp4": ("-c:v", "libx264", "-crf", "32", "-c:a", "aac", "-b:a", "48k"),
    "rescaled.mp4": ("-vf", "scale=96:96", "-c:v", "libx264", "-crf", "24", "-c:a", "copy"),
    "remuxed.mkv": ("-c", "copy"),
    "quieter.mp4": ("-c:v", "copy", "-af", "volume=0.4", "-c:a", "aac"),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Write five characters, two windows each, and four copies of the first."""
    folder = tmp_path_factory.mktemp("alike") / "toy"
    first, *_ = write_toyworld(folder, clips=5, seconds=4, jobs=1)
    for name, how in COPIES.items():
        subprocess.run(["ffmpeg", "-v", "error", "-i", str(first), *how, str(folder / name)], check=True)
    return folder


@pytest.fixture(scope="module")
def found(media, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "set")
    build_dataset([str(media)], out, CONFIG, progress=lambda *_: None)
    return out


def sources(dataset: str) -> list[str]:
    return sorted(clip.source_uri.rsplit("/", 1)[1] for clip in open_dataset(dataset))


def test_copies_are_excluded_and_characters_are_not(found, media):
    before = sources(found)
    assert inspect_dataset(found)["near_duplicates"] == 0
    counts = inspect_dataset(found, near_duplicates=True, verify=True)
    after = sources(found)
    first = min(name for name in before if name.startswith("toy"))
    alike = {first, *COPIES}
    assert [name for name in after if name not in alike] == [name for name in before if name not in alike]
    windows = before.count(first)
    assert sum(after.count(name) for name in alike) == windows
    assert counts["near_duplicates"] == len(COPIES) * windows == len(before) - len(after)


def test_comparisons_are_linear_in_the_number_of_copies(monkeypatch):
    """2,000 copies of a clip, 2,000 noisy copies of another one, and 1,000 unique clips."""
    draw = np.random.default_rng(1)
    one, other, *single = draw.integers(-100, 100, (1002, 1600)).astype(np.int8)
    noisy = [np.clip(other + draw.normal(0, 3, 1600), -127, 127).astype(np.int8) for _ in range(2000)]
    prints = [row.tobytes() for row in (*[one] * 2000, *noisy, *single)]
    count = 0

    def counted(*args):
        nonlocal count
        count += 1
        return similarity(*args)

    monkeypatch.setattr(near_duplicates, "similarity", counted)
    pairs = list(find_pairs(prints, [10.0] * len(prints)))
    assert count < 2 * len(prints)
    assert len(pairs) == 2 * 1999
    assert {pair.one < 2000 for pair in pairs if pair.other < 2000} == {True}
    assert all(pair.other < 4000 and (pair.one < 2000) == (pair.other < 2000) for pair in pairs)
    assert list(find_pairs([bytes(1600)] * 9, [10.0] * 9)) == [], "what has neither picture nor sound is like nothing"


@pytest.mark.slow
def test_order_and_units_do_not_change_the_result(found, media, tmp_path):
    other = str(tmp_path / "other")
    names = sorted(media.glob("*.m*"), reverse=True)
    for part in (names[:4], names):  # sources in another order, units of other sizes
        build_dataset([str(p) for p in part], other, replace(CONFIG, sources_per_unit=2), progress=lambda *_: None)
    inspect_dataset(found, near_duplicates=True)
    inspect_dataset(other, near_duplicates=True)
    one, two = (Store(dataset).read(DUPLICATES) for dataset in (found, other))
    assert one == two


@pytest.mark.slow
def test_audio_only_and_video_only_duplicates_are_found(media, tmp_path):
    for modality in ("audio", "video"):
        out = str(tmp_path / modality)
        build_dataset([str(media)], out, replace(CONFIG, modality=modality), progress=lambda *_: None)
        counts = inspect_dataset(out, near_duplicates=True)
        assert counts["near_duplicates"] >= len(COPIES)
        assert {name for name in sources(out) if name.startswith("toy")} >= {f"toy0000{i}.mp4" for i in range(1, 5)}
