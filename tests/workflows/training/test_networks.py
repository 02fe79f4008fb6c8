"""Weights of a network before its first step."""

from dataclasses import replace

import torch
from torch import nn

from tests.helpers.random_exports import CHANNELS, random_export
from workflows.checkpoints.load import load_weights
from workflows.config import presets
from workflows.config.latent_shapes import LatentShapes
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.training.networks import build_initial_network

SHAPES = LatentShapes(
    channels=CHANNELS,
    size={"video": (4, 4), "audio": (1, 1)},
    static_channels={"video": 35, "audio": 0},
    text_dim=16,
    chunk_seconds=0.5,
    chunks=4,
)


def config(stage: Stage, cross_bias: float | None) -> RunConfig:
    """Return a configuration of the size of ``random_export``."""
    whole = presets.build_preset("tiny", stage, SHAPES)
    return replace(whole, model=replace(whole.model, dim=32, layers=2, heads=2, cross_bias=cross_bias))


def biases(net: nn.Module) -> list[float]:
    """Return the bias of every layer, head and direction."""
    return [float(x) for n, w in net.state_dict().items() if ".cross_bias." in n for x in w]


def test_a_joint_network_starts_with_the_bias_of_its_configuration(tmp_path):
    parents: dict[Stage, object] = {stage: random_export(tmp_path / stage, stage) for stage in ("video", "audio")}
    net = build_initial_network(config("joint", -4.0), parents)
    assert biases(net) == [-4.0] * 8
    weights = {n: w for path in parents.values() for n, w in load_weights(path).items()}
    assert all(torch.equal(w, weights[n]) for n, w in net.state_dict().items() if "cross_bias" not in n)
    assert biases(build_initial_network(config("joint", None), parents)) == []


def test_a_mutual_network_takes_the_bias_of_its_parent_or_starts_at_zero(tmp_path):
    old = random_export(tmp_path / "old", "joint", cross_bias=None)
    assert biases(build_initial_network(config("mutual", -4.0), {"joint": old})) == [0.0] * 8
    new = random_export(tmp_path / "new", "joint", cross_bias=-3.0)
    kept = [float(x) for n, w in load_weights(new).items() if "cross_bias" in n for x in w]
    assert len(kept) == 8
    assert sorted(biases(build_initial_network(config("mutual", -4.0), {"joint": new}))) == sorted(kept)
