"""Configurations: presets build, JSON round-trips, errors name the wrong setting."""

import pytest
import torch

from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer, build_model
from workflows.config import presets, serialization
from workflows.config.latent_shapes import LatentShapes
from workflows.config.run import RunConfig

TOY = LatentShapes(
    channels={"video": 48, "audio": 64},
    size={"video": (8, 8), "audio": (1, 1)},
    static_channels={"video": 35, "audio": 0},
    text_dim=64,
    chunk_seconds=0.5,
    chunks=20,
)
WAN = LatentShapes(
    channels={"video": 48, "audio": 64},
    size={"video": (24, 42), "audio": (1, 1)},
    static_channels={"video": 48, "audio": 0},
    text_dim=4096,
    chunk_seconds=0.5,
    chunks=20,
)
STAGES = ("video", "audio", "joint", "mutual")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_builds_for_every_stage(name, stage):
    config = presets.build_preset(name, stage, TOY if name == "tiny" else WAN)
    assert serialization.from_dict(RunConfig, serialization.to_dict(config)) == config
    assert config.data.chunks[1] > config.model.window_chunks, "the truncated state must be trained"
    with torch.device("meta"):
        AVTransformer(config.model)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("small", 80e6, 120e6), ("base", 2 * 1.3e9, 2 * 1.55e9), ("full", 13e9, 15e9)]
)
def test_presets_have_the_size_they_claim(name, low, high):
    with torch.device("meta"):
        network = AVTransformer(presets.build_preset(name, "joint", WAN).model)
    assert low < sum(p.numel() for p in network.parameters()) < high


def test_settings_accept_the_command_as_prefix():
    sets = ["train.skip_nonfinite=3", "train.optim.lr=0.001"]
    assert serialization.parse_overrides(sets) == {"skip_nonfinite": 3, "optim": {"lr": 0.001}}


def test_settings_change_nested_fields_and_nothing_else():
    config = presets.build_preset("tiny", "mutual", TOY)
    sets = ["optim.lr=1e-4", "data.chunks=[3,5]", "objective.guidance=3", "model.branches.video.patch=[2,2]"]
    changed = serialization.apply_overrides(config, serialization.parse_overrides(sets))
    assert serialization.diff(serialization.to_dict(config), serialization.to_dict(changed)) == [
        "data.chunks: [3, 6] -> [3, 5]",
        "model.branches.video.patch: [2, 8] -> [2, 2]",
        f"objective.guidance: {config.objective.guidance} -> 3.0",
        f"optim.lr: {config.optim.lr} -> 0.0001",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optm.lr=1", "unknown setting optm: did you mean optim?"),
        ("objective.guidnce=1", "did you mean objective.guidance?"),
        ("model.branches.vidoe.patch=[2,2]", "did you mean model.branches.video?"),
        ("optim.lr=fast", "setting optim.lr: .*'fast'"),
        ("steps=1.5", "setting steps: .*1.5"),
        ("data.batch=4", "data.batch 4 is too small for engine.workers 2: each of them needs at least 4"),
        ("data.batch=10", "whole cycles of the 4 row kinds"),
        ("engine.workers=[3,2]", r"engine.workers is a number or \[fewest, most\]"),
        ("objective.share_history=true", "set fake.rank, or objective.share_history=false"),
        ("ema.decay=1.5", r"EMA decay must be in \[0, 1\), got 1.5"),
        ("steps", "not of the form a.b=value"),
        ("data.chunks=[3,", "its value is not YAML"),
    ],
)
def test_an_error_names_the_wrong_setting(setting, message):
    config = presets.build_preset("tiny", "mutual", TOY)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        serialization.apply_overrides(config, serialization.parse_overrides([setting]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective.dmd_from=1", "dmd_from 1"),
        ("objective.finest=0", "finest=0"),
        ("objective.guidance=x", r"setting objective.guidance: .*number.*got 'x'"),
        ("objective.rows=[real]", "equal lengths"),
        ("objective.dmd_weight=[1]", r"setting objective.dmd_weight: .*got \[1\]"),
    ],
)
def test_an_error_names_the_wrong_setting_of_the_mutual_objective(setting, message):
    """An objective is a union of two types; only errors of the matching one are reported."""
    with pytest.raises(ValueError, match=message):
        serialization.apply_overrides(
            presets.build_preset("tiny", "mutual", TOY), serialization.parse_overrides([setting])
        )


def test_a_configuration_file_overrides_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1e-4}\nsteps: 7\n")
    config = serialization.apply_overrides(
        presets.build_preset("tiny", "video", TOY), serialization.load_config_file(file)
    )
    assert (config.optim.lr, config.steps) == (1e-4, 7)
    file.write_text("- a list\n")
    with pytest.raises(ValueError, match="settings by name"):
        serialization.load_config_file(file)
    with pytest.raises(ValueError, match="cannot read"):
        serialization.load_config_file(tmp_path / "absent.yaml")
    file.write_bytes(b"\x00\x00\xe8\xff")
    with pytest.raises(ValueError, match="mine.yaml is neither YAML nor JSON"):
        serialization.load_config_file(file)


def test_older_metadata_builds_a_network_without_newer_parameters():
    values = serialization.to_dict(presets.tiny("video", TOY).model)
    assert values.pop("local_start") and values.pop("chunk_phase")
    names = [n for n, _ in build_model(serialization.from_dict(ModelConfig, values), 0).named_parameters()]
    assert not any("phase" in n or ("offset" in n and "words" not in n) for n in names)
