"""Export weights in one file or in shards give the same network."""

import pytest
import torch
from safetensors.torch import save_file

from mfcore.weights import SHARD_BYTES, load_strict, merge_branches, shard_weights
from tests.helpers.random_exports import random_export
from tests.helpers.tiny_model import network
from workflows.checkpoints.load import load_export, load_weights
from workflows.evaluation.sweep import _digest


def test_shards_contain_whole_tensors_up_to_the_size_limit():
    weights = {f"w{i}": torch.zeros(n, dtype=torch.uint8) for i, n in enumerate((3, 4, 2, 9, 1))}
    files = shard_weights("ema", weights, most=7)
    assert [list(part) for part in files.values()] == [["w0", "w1"], ["w2"], ["w3"], ["w4"]]
    assert next(iter(files)) == "ema-00001-of-00004.safetensors"
    assert list(shard_weights("ema", weights)) == ["ema.safetensors"] and SHARD_BYTES == 5e9


def test_an_export_in_shards_is_the_same_network(tmp_path):
    export_dir = random_export(tmp_path / "one", "joint")
    whole, known = load_weights(export_dir), load_export(export_dir)[0].state_dict()
    files = shard_weights("ema", whole, most=sum(w.nbytes for w in whole.values()) // 3)
    alone = next(export_dir.rglob("ema.safetensors"))
    before = _digest(alone.parent, "ema")
    alone.unlink()
    for name, part in files.items():
        save_file(part, alone.parent / name)
    assert len(files) >= 3 and all(torch.equal(w, known[n]) for n, w in load_weights(export_dir).items())
    assert load_export(export_dir)[0].state_dict().keys() == known.keys()
    assert len(_digest(alone.parent, "ema")) == 16 and _digest(alone.parent, "ema") != before
    (alone.parent / list(files)[1]).unlink()
    with pytest.raises(ValueError, match=rf"{len(files) - 1} of the {len(files)} files of its ema weights"):
        load_weights(export_dir)
    with pytest.raises(ValueError, match=r"raw\.safetensors does not exist"):
        load_weights(export_dir, "raw")


def test_a_joint_network_contains_the_weights_of_both_parents_only():
    joint, parts = network(seed=3), {m: network(m, seed=i).state_dict() for i, m in enumerate(("video", "audio"))}
    load_strict(joint, merge_branches(parts), "the parents")
    assert all(torch.equal(w, parts[name.split(".")[1]][name]) for name, w in joint.state_dict().items())
    with pytest.raises(ValueError, match=r"the parents is of another network: .*branches\.audio\.[\w.]+ missing"):
        load_strict(joint, parts["video"], "the parents")
