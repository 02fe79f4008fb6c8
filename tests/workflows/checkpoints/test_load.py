"""Exports are verified before use: checksums of COMPLETE, and shapes before anything is allocated."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfcore.errors import UserInputError
from tests.helpers.checkpoint_parts import PROGRESS, parts, writer
from tests.helpers.random_exports import random_export
from workflows.checkpoints.load import find_export, load_export, load_weights, locate_export
from workflows.checkpoints.store import COMPLETE_FILE
from workflows.inference.pipeline import StreamingPipeline


def flip(path: Path) -> None:
    """Flip one bit of the last byte: a mantissa of the last weight."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Write a run with two checkpoints."""
    engines, ema = parts(0)
    saver = writer(tmp_path / "run" / "checkpoints", engines, ema)
    for step in (3, 4):
        saver.save(replace(PROGRESS, step=step, samples_seen=4 * step))
        saver.wait()
    return tmp_path / "run"


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("use", [load_weights, load_export, StreamingPipeline.from_checkpoint])
@pytest.mark.parametrize("part", ["", "export"])
def test_a_flipped_bit_in_an_export_is_one_message_with_the_remedy(run_dir, use, part):
    folder = checkpoints(run_dir)[-1]
    flip(folder / "export" / "ema.safetensors")
    with pytest.raises(UserInputError, match=r"export/ema\.safetensors is damaged: .*COMPLETE.*Use another checkpoint"):
        use(folder / part)
    load_weights(folder, "raw")


def test_changed_metadata_is_damage(run_dir):
    folder = checkpoints(run_dir)[-1]
    metadata = folder / "export" / "model.json"
    metadata.write_text(metadata.read_text().replace('"words"', '"other"'))
    with pytest.raises(UserInputError, match=r"export/model\.json is damaged"):
        load_export(folder)


@pytest.mark.parametrize("victim", ["export/ema.safetensors", "export/model.json", COMPLETE_FILE])
def test_a_run_gives_the_newest_whole_export(run_dir, caplog, victim):
    older, newer = checkpoints(run_dir)
    assert find_export(run_dir) == newer / "export"
    if victim == COMPLETE_FILE:
        (newer / victim).write_bytes(b"")
    else:
        flip(newer / victim)
    assert find_export(run_dir) == older / "export"
    assert locate_export(run_dir) == str(older)
    assert f"{newer / victim} is damaged" in caplog.text
    flip(older / "export" / "ema.safetensors")
    with pytest.raises(UserInputError, match=r"has no intact checkpoint: .* is damaged"):
        find_export(run_dir)


def test_an_empty_marker_is_named(run_dir):
    newer = checkpoints(run_dir)[-1]
    (newer / COMPLETE_FILE).write_bytes(b"")
    with pytest.raises(UserInputError, match=r"COMPLETE is damaged.*another checkpoint"):
        find_export(newer)


def test_an_export_that_was_copied_alone_is_used_without_checksums(run_dir, tmp_path):
    shutil.copytree(checkpoints(run_dir)[-1] / "export", tmp_path / "alone")
    flip(tmp_path / "alone" / "ema.safetensors")
    load_export(tmp_path / "alone")


def test_a_damaged_record_that_is_needed_is_one_message(tmp_path):
    (tmp_path / "run.json").write_bytes(b"")
    with pytest.raises(UserInputError, match=rf"{tmp_path}/run\.json is damaged.*`mfctl train`"):
        find_export(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"), [("dim", 1 << 20), ("dim", 1 << 62), ("layers", 10**9), ("text_dim", 1 << 40)]
)
def test_sizes_of_another_network_are_refused_before_anything_is_allocated(tmp_path, setting, value):
    export = random_export(tmp_path, "video")
    facts = json.loads((export / "model.json").read_text())
    facts["model"][setting] = value
    (export / "model.json").write_text(json.dumps(facts))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserInputError, match=r"model\.json"):
        load_export(export)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_weights_with_other_shapes_are_refused_from_their_header(tmp_path, monkeypatch):
    export = random_export(tmp_path, "video")
    weights = load_weights(export)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    save_file({**weights, name: torch.zeros(3, 5)}, export / "ema.safetensors")
    monkeypatch.setattr("workflows.checkpoints.load.build_model", lambda *_: pytest.fail("the network was built"))
    with pytest.raises(UserInputError, match=rf"another size.*{name} \(3, 5\) there"):
        load_export(export)
