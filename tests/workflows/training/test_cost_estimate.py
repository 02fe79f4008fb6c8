"""Costs of the presets, against values derived by hand from their shapes."""

import pytest

from mfcore.model.config import ModelConfig
from mfcore.types import AUDIO, VIDEO
from workflows.config import presets
from workflows.config.latent_shapes import default_size, geometry_for_preset
from workflows.config.stages import STAGES
from workflows.training.cost_estimate import estimate_without_dataset


def model(preset: str, stage: presets.Stage = "joint") -> ModelConfig:
    return presets.build_preset(preset, stage, geometry_for_preset(preset).shapes(default_size(preset))).model


def costs(preset: str) -> dict:
    return estimate_without_dataset("joint", preset, (), None)["costs"]


def own_branch(*, d: int, layers: int, hidden: int, e: int, width: int, text: int, anchor: int) -> int:
    """Parameters of a branch of the own layout, weights and biases."""
    attention = 3 * d * d + 3 * d + 4 * e + d * d + d
    reading = 3 * (2 * d * d + 2 * d) + 2 * d * d + d + (2 + 4) * e + 2 * d
    layer = attention + reading + 2 * d * hidden + hidden + d + 6 * d
    levels = 3 * (128 * d + d + d * d + d) + 8 * d * d + 8 * d
    words = text * d + d + (text + 128) * d + d + 2 * d
    ends = 2 * (width * d + d) + d * width + width + d + 8 * d
    layer += d // e  # per head, the bias on the other branch
    return layers * layer + levels + words + ends + anchor


def wan_branch(*, d: int, layers: int, hidden: int, w: int, e: int, width: int, text: int) -> int:
    """Parameters of a branch as Wan's, with attention of width w to a transcript, interval, trust, sink, phases."""
    wan_layer = 8 * (d * d + d) + 4 * d + 2 * d + 2 * d * hidden + hidden + d + 6 * d
    wan_ends = width * d + d + d * width + width + 2 * d
    wan_embedders = 256 * d + d + d * d + d + 6 * d * d + 6 * d + text * d + d + d * d + d
    reading = d * w + w + 2 * d * w + 2 * w + w * d + 4 * e
    rest = 2 * (256 * d + d + d * d + d) + (text + 128) * d + d + 2 * d + width * d + d + d + 8 * d
    return layers * (wan_layer + reading) + wan_ends + wan_embedders + rest


def test_small_has_about_a_tenth_of_a_billion_parameters():
    shape = {"d": 512, "layers": 8, "hidden": 2048, "e": 64, "text": 4096}
    counted = costs("small")["parameters"]
    assert counted[VIDEO] == own_branch(**shape, width=48 * 4, anchor=48)
    assert counted[AUDIO] == own_branch(**shape, width=64, anchor=0)
    assert counted["total"] == pytest.approx(1e8, rel=0.05)


def test_base_is_wan_1_3b_plus_transcript_layers():
    shape = {"d": 1536, "layers": 30, "hidden": 8960, "w": 3 * 128, "e": 128, "text": 4096}
    counted = costs("base")["parameters"]
    assert counted[VIDEO] == wan_branch(**shape, width=16 * 4)
    assert counted[AUDIO] == wan_branch(**shape, width=64)
    assert 1.3e9 < counted[VIDEO] < 1.55e9


def test_full_has_seven_billion_parameters_in_each_branch():
    shape = {"d": 4096, "layers": 20, "hidden": 4 * 4096, "e": 128, "text": 4096}
    counted = costs("full")["parameters"]
    assert counted[VIDEO] == own_branch(**shape, width=48 * 4, anchor=48)
    assert counted[AUDIO] == own_branch(**shape, width=64, anchor=0)
    assert counted[VIDEO] == pytest.approx(7e9, rel=0.02)


def test_operations_of_a_full_chunk():
    """192 x 336, padded to 192 x 352: 6 x 11 tokens a frame, 3 frames and at most 11 sounds a chunk, ten of history."""
    config = model("full")
    assert config.branches[VIDEO].grid == (6, 11) and config.branches[AUDIO].grid == (1, 1)
    d, layers, caption, words = 4096, 20, 129, 9
    n = 3 * 66 + 11
    seen = (66 + 11) + 11 * n
    project, rest = 3 * d * d, 13 * d * d + 2 * d * (seen + caption + words)
    level, out = 2 * (128 * d + d * d) + 8 * d * d, 3 * 66 * 192 * d + 11 * 64 * d
    about = 2 * (128 * 4096 * d + layers * 2 * d * d * caption)  # kept from chunk to chunk
    transcript = 2 * (8 * (4096 + 128) * d + layers * 2 * d * d * words)
    bare = layers * n * (project + rest) + 2 * out + 8 * n * d + 2 * level
    found = costs("full")
    assert found["gflop_per_evaluation"] == pytest.approx(2e-9 * (bare + about + transcript), abs=1e-3)
    chunk = 4 * bare + bare - n * rest - out + transcript
    assert found["gflop_per_chunk_at_4_steps"] == pytest.approx(2e-9 * chunk, abs=1e-3)
    # keys and values of 20 layers in 2 bytes; 6 x 66 + 44100 / 2048 tokens a second
    assert found["cache_bytes_per_second_of_history"] == round(2 * layers * d * 2 * (6 * 66 + 44100 / 2048))


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_and_stage_is_estimated_without_memory(preset, stage):
    result = estimate_without_dataset(stage, preset, (), None)
    assert set(result["costs"]["parameters"]) == {*STAGES[stage].modalities, "total"}


def test_sizes_are_padded_to_the_codec():
    assert geometry_for_preset("full").padded((192, 336)) == (192, 352)
    assert geometry_for_preset("full").padded((704, 1280)) == (704, 1280)
    assert geometry_for_preset("base").padded((192, 336)) == (192, 336)
    with pytest.raises(ValueError, match="both edges must be positive"):
        geometry_for_preset("full").padded((0, 336))
