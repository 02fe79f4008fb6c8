"""`mfctl train --init-video-from`: Wan's weights from a folder as diffusers saves it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mfcore.codecs.t5 import T5TextEncoder, t5_config_from_folder
from mfcore.model.config import BranchConfig
from mfcore.types import VIDEO
from tests.helpers.tiny_pretrained import save_t5
from workflows.config import presets
from workflows.config.latent_shapes import geometry_for_preset
from workflows.training.cost_estimate import estimate_without_dataset
from workflows.training.networks import build_initial_network
from workflows.training.pretrained_init import describe_wan_import

TINY = (
    "model.dim=48",
    "model.layers=2",
    "model.heads=2",
    "model.word_heads=1",
    "model.mlp_ratio=2",
    "model.text_dim=32",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save the real class in several files."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan", reason="needs diffusers")
    torch.manual_seed(0)
    model = module.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, ffn_dim=96, num_layers=2, freq_dim=256
    )
    place = tmp_path_factory.mktemp("wan")
    model.save_pretrained(place / "transformer", max_shard_size="100KB")
    assert len(list((place / "transformer").glob("*.safetensors"))) > 1
    return place


def config(folder, **changes):
    start = presets.build_preset("base", "video", geometry_for_preset("base").shapes((32, 32)))
    sizes = {"dim": 48, "layers": 2, "heads": 2, "word_heads": 1, "mlp_ratio": 2.0, "text_dim": 32}
    return replace(start, init_video=str(folder), model=replace(start.model, **(sizes | changes)))


@torch.no_grad()
def test_the_null_branch_starts_as_the_empty_prompt_of_the_text_encoder(tmp_path):
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan", reason="needs diffusers")
    save_t5(tmp_path)
    encoder = T5TextEncoder(t5_config_from_folder(str(tmp_path)), "cpu")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2, "freq_dim": 256}
    wan = module.WanTransformer3DModel(**sizes, text_dim=encoder.width)
    wan.save_pretrained(tmp_path / "transformer")
    model = build_initial_network(config(tmp_path, text_dim=encoder.width), {})
    null = model.state_dict()["branches.video.text.nothing.weight"][0]
    end = encoder.encode_empty()
    assert end.shape == (1, encoder.width)
    torch.testing.assert_close(null, wan.condition_embedder.text_embedder(end)[0])
    alone = build_initial_network(config(tmp_path / "transformer", text_dim=encoder.width), {})
    padding = wan.condition_embedder.text_embedder(torch.zeros(1, encoder.width))[0]
    torch.testing.assert_close(alone.state_dict()["branches.video.text.nothing.weight"][0], padding)


def test_a_run_starts_from_the_weights_of_the_folder(folder):
    torch.manual_seed(0)
    model = build_initial_network(config(folder), {})
    fresh = build_initial_network(replace(config(folder), init_video=None), {})
    wan: dict[str, torch.Tensor] = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        wan |= load_file(path)
    own = model.state_dict()
    assert torch.equal(
        own["branches.video.levels.level.0.weight"], wan["condition_embedder.time_embedder.linear_1.weight"]
    )
    assert torch.equal(own["branches.video.blocks.1.mlp.2.bias"], wan["blocks.1.ffn.net.2.bias"])
    words = "branches.video.text.words.weight"
    assert torch.equal(own[words], fresh.state_dict()[words])


def test_the_table_has_the_source_of_every_weight(folder):
    sets = [*TINY, f"init_video={json.dumps(str(folder))}"]
    shown = estimate_without_dataset("video", "base", sets, None)["init_video"]
    assert "loaded          2 x branches.video.blocks.*.mlp.0.weight" in shown
    assert "blocks.*.ffn.net.0.proj.weight" in shown
    assert "initialized     1 x branches.video.text.words.weight" in shown
    assert "skipped" not in shown
    assert describe_wan_import(replace(config(folder), init_video=None)) == {}


def test_folders_that_do_not_fit_are_errors_with_the_reason(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        describe_wan_import(config(tmp_path))
    with pytest.raises(ValueError, match="num_attention_heads 2 there, 3 here"):
        describe_wan_import(config(folder, heads=3, dim=72))
    with pytest.raises(ValueError, match=r"mlp\.0\.bias \(96,\) there, \(144,\) here; .*mlp\.0\.weight"):
        describe_wan_import(config(folder, mlp_ratio=3.0))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ValueError, match="is a FluxTransformer2DModel: name the diffusers folder"):
        describe_wan_import(config(tmp_path))
    branches = {VIDEO: BranchConfig(channels=48, size=(4, 4), patch=(2, 2), data_std=None)}
    with pytest.raises(ValueError, match=r"embed\.weight \(48, 64\) there, \(48, 192\) here"):
        describe_wan_import(config(folder, branches=branches))


def test_other_stages_start_from_runs(folder):
    joint = presets.build_preset("base", "joint", geometry_for_preset("base").shapes((32, 32)))
    with pytest.raises(ValueError, match="stage joint starts from finished runs"):
        replace(joint, init_video=str(folder))
