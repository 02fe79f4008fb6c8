"""Check that rows carry the digest of the weights that are sampled."""

from dataclasses import replace
from pathlib import Path

import pytest

from mfcore.errors import UserInputError
from tests.helpers.checkpoint_parts import PROGRESS, parts, writer
from workflows.checkpoints.load import load_export
from workflows.evaluation.sweep import identify_checkpoint


def save(root: Path, seed: int, step: int) -> Path:
    """Write a checkpoint and return its folder."""
    saver = writer(root, *parts(seed), keep=9)
    place = saver.save(replace(PROGRESS, step=step, samples_seen=step))
    saver.wait()
    return Path(place)


def test_a_sweep_of_a_run_keeps_its_checkpoint_while_the_run_saves_others(tmp_path: Path) -> None:
    first = save(tmp_path / "checkpoints", 0, 4)
    known = identify_checkpoint(str(tmp_path))
    second = save(tmp_path / "checkpoints", 1, 8)
    assert (known.path, known.source) == (str(tmp_path), str(first))
    assert known.digest != identify_checkpoint(str(tmp_path)).digest == identify_checkpoint(str(second)).digest


def test_weights_that_differ_from_the_digest_of_a_row_are_not_sampled(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 0, 4)
    known = identify_checkpoint(str(folder))
    path = folder / "export" / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserInputError, match="ema.safetensors is damaged"):
        load_export(known.source)
