"""Test preprocessing, training and generation with pretrained codecs of tiny random weights."""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mfcore.codecs import pretrained
from mfcore.types import AUDIO, VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.probe import probe
from preprocessing.pipeline import build_encoders, process_sources
from preprocessing.records import Clip, Rejected
from preprocessing.sources.discovery import find_sources
from preprocessing.steps import encode as encode_step
from preprocessing.steps.encode import EncoderConfig
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.small_training import SMALL
from tests.helpers.source_processing import process_source
from tests.helpers.tiny_pretrained import save_oobleck, save_t5, save_wan
from workflows.checkpoints.load import load_metadata
from workflows.data.build import build_dataset
from workflows.data.codec_options import apply_codec_options
from workflows.data.inspect import inspect_dataset
from workflows.data.reconstruct import reconstruct_clip
from workflows.inference.generate import ClipPrompt, generate_clip
from workflows.training import worker
from workflows.training.train import train_stage

pytestmark = pytest.mark.slow  # importing diffusers and transformers alone takes seconds
STEPS = ("steps=2", "data.batch=2", "data.chunks=[2,2]", "data.held_out=0.3", "eval_every=2", "optim.warm_up=0")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Write ``wan/``, ``t5/`` and ``stable/vae/`` in the layouts of their publishers."""
    folder = tmp_path_factory.mktemp("models")
    save_wan(folder / "wan")
    save_oobleck(folder / "stable" / "vae")
    save_t5(folder / "t5")
    return folder


@pytest.fixture(scope="module")
def config(models) -> PreprocessConfig:
    plain = PreprocessConfig(workers=0, window_seconds=Fraction(1), sources_per_unit=8)
    return apply_codec_options(plain, f"wan:{models / 'wan'}", f"oobleck:{models / 'stable'}", f"t5:{models / 't5'}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_toyworld(folder, clips=4, seconds=1.0, size=32, jobs=1)
    (folder / "no media.mp4").write_text("a pointer")
    return folder


@pytest.fixture(scope="module")
def dataset(clips, config, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "set")
    counts = build_dataset([str(clips)], out, replace(config, sizes=((32, 32),)), progress=lambda *_: None)
    assert (counts["accepted"], counts["rejected"]) == (4, 1)
    return out


def test_rows_contain_latents_of_the_codecs_on_their_clocks(dataset, models):
    inspect_dataset(dataset, verify=True)
    clips = open_dataset(dataset)
    clip, meta = clips.clip(0), clips.meta
    assert (meta.codecs[VIDEO].split("/")[0], meta.codecs[AUDIO].split("/")[0]) == ("wan-v1", "oobleck-v1")
    assert clip.video.shape == (1 + 6, 48, 2, 2)  # 1 s at 24 / 4, blocks of 16 pixels
    assert clip.audio.shape == (22, 8)  # 44100 / 2048 per second, those begun count
    assert clip.caption_embedding.shape[1] == 16
    assert meta.stats[VIDEO].std[10] == pytest.approx(1.2)  # published, not measured
    assert len(meta.stats[AUDIO].std) == 8
    assert clip.chunks == 2
    assert str(models) not in str(meta.config)  # the fingerprint depends on the weights, not on the path


def test_batched_and_single_encoding_are_equal(clips, config):
    config = replace(config, sizes=((32, 32),), encoder=EncoderConfig(batch=3, ahead_bytes=1))
    encoders, sources = build_encoders(config), find_sources([str(clips)])
    together = list(process_sources(sources, config, encoders))
    assert [source for source, _ in together] == sources
    for source, found in together:
        (alone,) = process_source(source, replace(config, encoder=EncoderConfig(batch=1)), encoders)
        if isinstance(found, Rejected):
            assert isinstance(alone, Rejected)
            assert alone.reason == found.reason
            continue
        assert isinstance(alone, Clip)
        assert all(torch.allclose(found.latents[m], alone.latents[m], atol=1e-4) for m in (VIDEO, AUDIO))


def test_only_the_failing_clip_is_rejected(clips, config, monkeypatch):
    config = replace(config, sizes=((32, 32),))
    encoders, real = build_encoders(config), encode_step._encoded
    sources = [s for s in find_sources([str(clips)]) if "no%20media" not in s.uri]

    def broken(clip, latents, encoders):
        if clip.source.uri == sources[1].uri:
            raise ZeroDivisionError("a bad clip")
        return real(clip, latents, encoders)

    monkeypatch.setattr(encode_step, "_encoded", broken)
    found = [clip for _, clip in process_sources(sources, config, encoders)]
    assert [isinstance(clip, Clip) for clip in found] == [True, False, True, True]
    assert (found[1].step, found[1].reason) == ("encode", "error")


def test_moved_weights_continue_a_dataset_and_other_weights_do_not(dataset, clips, config, models, tmp_path):
    shutil.copytree(models / "wan", tmp_path / "moved")
    moved = apply_codec_options(replace(config, sizes=((32, 32),)), f"wan:{tmp_path / 'moved'}")
    before = {p: p.stat().st_mtime_ns for p in Path(dataset).rglob("*.parquet")}
    build_dataset([str(clips)], dataset, moved, progress=lambda *_: None)
    assert {p: p.stat().st_mtime_ns for p in Path(dataset).rglob("*.parquet")} == before
    save_wan(tmp_path / "other", seed=1)
    other = apply_codec_options(replace(config, sizes=((32, 32),)), f"wan:{tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"another configuration:\n  video.weights"):
        build_dataset([str(clips)], dataset, other)


def test_missing_weights_stop_the_run_without_rejects(clips, config, models, tmp_path):
    shutil.copytree(models / "wan", tmp_path / "wan")
    gone = apply_codec_options(replace(config, sizes=((32, 32),)), f"wan:{tmp_path / 'wan'}")
    shutil.rmtree(tmp_path / "wan")
    with pytest.raises(ValueError, match=f"set {pretrained.CODECS_ENV}"):
        build_dataset([str(clips)], str(tmp_path / "out"), gone, progress=lambda *_: None)
    assert not list((tmp_path / "out").rglob("_done/*"))


def test_invalid_codec_names_are_rejected(models, tmp_path):
    for wrong in ({"video": "wan"}, {"video": "oobleck:x"}, {"audio": "dct"}, {"text": "clip:x"}):
        with pytest.raises(ValueError, match="choose one of"):
            apply_codec_options(PreprocessConfig(), **wrong)
    with pytest.raises(ValueError, match="contains no"):
        apply_codec_options(PreprocessConfig(), f"wan:{tmp_path}")
    with pytest.raises(ValueError, match="multiples of video.block=16"):
        replace(apply_codec_options(PreprocessConfig(), f"wan:{models / 'wan'}"), sizes=((40, 40),))


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> str:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFCTL_TRACKER", "json")
        for stage in ("video", "audio", "joint"):
            result = train_stage(stage, data=dataset, sets=(*SMALL, *STEPS), runs_dir=runs, launch=worker.run_worker)
    return result["run_dir"]


def test_checkpoint_generates_with_its_recorded_codecs(trained, tmp_path, models, monkeypatch):
    card = load_metadata(trained)
    assert card.folders == {VIDEO: f"{models}/wan", AUDIO: f"{models}/stable", "text": f"{models}/t5"}
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "first.png")
    facts = generate_clip(
        trained,
        ClipPrompt(
            first_frame=str(tmp_path / "first.png"),
            transcript='[{"word": "ba", "start": 0.1, "end": 0.4}]',
            caption="a hat",
            seconds=1.5,
        ),
        out=str(tmp_path / "out.mp4"),
        steps=1,
    )
    assert facts["frames"] == 1 + 3 * 12
    info = probe(tmp_path / "out.mp4")
    assert info.audio.sample_rate == 44100


def test_row_is_reconstructed(dataset, tmp_path):
    clips = open_dataset(dataset)
    facts = reconstruct_clip(dataset, clips.ids[0], str(tmp_path / "row.mp4"))
    assert facts["frames"] == 25
    assert probe(tmp_path / "row.mp4").audio.sample_rate == 44100


@pytest.mark.timeout(600)
def test_ray_actors_build_the_same_dataset(dataset, clips, config, tmp_path):
    """Use the same Ray actors on the CPU that have a share of a GPU elsewhere."""
    build_dataset(
        [str(clips)], str(tmp_path / "out"), replace(config, sizes=((32, 32),), workers=2), progress=lambda *_: None
    )
    here, there = open_dataset(dataset), open_dataset(str(tmp_path / "out"))
    assert here.ids == there.ids
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.video, theirs.video)
        assert torch.equal(mine.audio, theirs.audio)
    gpu = replace(config, sizes=((32, 32),), workers=2, encoder=EncoderConfig(gpus=0.5))
    with pytest.raises(ValueError, match=r"encoder.gpus=0.5: Ray sees no such share"):
        build_dataset([str(clips)], str(tmp_path / "gpu"), gpu, progress=lambda *_: None)
