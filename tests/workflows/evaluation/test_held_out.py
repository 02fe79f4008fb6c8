"""The world of an evaluation set: recorded by the dataset, or recognized by the captions of an older one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from preprocessing.dataset.reader import open_dataset
from workflows.evaluation.held_out import _toy_config, select_evaluation_set

TOY_CAPTION = "a character with a red face and short black hair talks in front of a blue wall"


def test_the_world_reaches_the_dataset_and_selects_the_toy_metrics(toy_data: str) -> None:
    dataset = open_dataset(toy_data)
    assert {dataset.clip(i).world for i in range(len(dataset))} == {"toyworld/1"}
    assert select_evaluation_set(toy_data, clips=2, seconds=None, fraction=None).toy is not None


@pytest.mark.parametrize(
    ("world", "caption", "is_toy"),
    [
        ("toyworld/1", "a caption of another form", True),
        ("toyworld/2", TOY_CAPTION, False),
        ("toyworld-english/1", TOY_CAPTION, True),
        ("another/1", TOY_CAPTION, False),
        (None, TOY_CAPTION, True),
        (None, "a person talks", False),
    ],
)
def test_the_recorded_world_decides_and_captions_only_without_one(
    toy_data: str, world: str | None, caption: str, is_toy: bool
) -> None:
    dataset = open_dataset(toy_data)
    clips = [replace(dataset.clip(i), world=world, caption=caption) for i in range(2)]
    assert (_toy_config(clips, dataset.meta) is not None) == is_toy


def test_clips_of_several_worlds_are_no_toy_world(toy_data: str) -> None:
    dataset = open_dataset(toy_data)
    assert _toy_config([dataset.clip(0), replace(dataset.clip(1), world=None)], dataset.meta) is None


def test_a_dataset_without_the_column_is_read(toy_data: str, tmp_path: Path) -> None:
    old = shutil.copytree(toy_data, tmp_path / "old")
    for path in (old / "clips").glob("*.parquet"):
        table = pq.ParquetFile(path).read(use_threads=False)
        pq.write_table(table.drop_columns("world"), path)
    dataset = open_dataset(str(old))
    assert dataset.clip(0).world is None
    assert _toy_config([dataset.clip(0)], dataset.meta) is not None
