"""Training on datasets of one modality and of several shapes."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.mp4_writer import write_mp4
from tests.helpers.av_clock_media import numbered_frames, sound
from tests.helpers.small_training import SMALL
from workflows.config.run import DataConfig
from workflows.data import batches
from workflows.data.batches import RankShard, TrainingBatchLoader
from workflows.data.build import build_dataset
from workflows.data.collate import BatchCollator
from workflows.training import worker
from workflows.training.train import train_stage

FPS, RATE = Fraction(24), 16000
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2))


def quiet(*_) -> None: ...


def write_sources(folder: Path, count: int, *, seen: bool = True, heard: bool = True) -> str:
    """Clips of about three seconds; every second one is upright, the others lie."""
    folder.mkdir()
    for number in range(count):
        frames = np.repeat(numbered_frames(73 + number), 2, axis=1 + number % 2)
        wave = sound(3 + number / 24, RATE)
        write_mp4(folder / f"{number}.mp4", frames if seen else None, FPS, wave if heard else None, sample_rate=RATE)
    return str(folder)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_unimodal_stage_trains_on_a_unimodal_dataset(modality, tmp_path):
    media = write_sources(tmp_path / "media", 6, seen=modality == "video", heard=modality == "audio")
    counts = build_dataset(
        [media], str(tmp_path / "set"), replace(CONFIG, modality=modality, fit="pad"), progress=quiet
    )
    assert (counts["accepted"], counts["rejected"]) == (12, 0)
    sets = (*SMALL, "steps=2", "data.chunks=[2,2]", "data.batch=2", "eval_every=2")
    done = train_stage(
        modality, data=str(tmp_path / "set"), sets=sets, runs_dir=tmp_path / "runs", launch=worker.run_worker
    )
    assert np.isfinite(done["losses"]["last"])


def test_every_source_gets_the_nearest_shape_and_every_batch_has_one(tmp_path):
    media = write_sources(tmp_path / "media", 6)
    config = replace(CONFIG, sizes=((64, 32), (32, 64), (128, 64), (48, 48)))
    build_dataset([media], str(tmp_path / "set"), config, progress=quiet)
    names = sorted(path.name.split("-", 2)[2] for path in (tmp_path / "set" / "clips").iterdir())
    assert names == ["128x64.parquet", "32x64.parquet"], "a bucket to a file; the largest that enlarges nothing"
    data = open_dataset(str(tmp_path / "set"))
    assert sorted(set(data.shapes)) == [(4, 8), (16, 8)]
    settings = DataConfig(batch=2, chunks=(2, 2))
    assembly = BatchCollator(timeline=data.meta.timeline(), stats=data.meta.stats)
    loader = TrainingBatchLoader(batches.clip_split(data), assembly, settings, seed=0, shard=RankShard(rank=0, world=1))
    shapes = {
        tuple(micro.streams["video"].latents.shape[3:]) for step in range(6) for micro in loader.micro_batches(step)
    }
    assert shapes == {(4, 8), (16, 8)}


def test_the_nearest_shape_bucket_is_chosen():
    sizes = ((192, 336), (336, 192), (384, 672), (256, 256))
    choose = replace(CONFIG, sizes=sizes).target_size
    assert choose((720, 1280)) == (384, 672)
    assert choose((300, 520)) == (192, 336), "nothing is enlarged where another size of the shape fits"
    assert choose((100, 180)) == (192, 336)
    assert choose((1280, 720)) == (336, 192)
    assert choose((500, 480)) == (256, 256)
