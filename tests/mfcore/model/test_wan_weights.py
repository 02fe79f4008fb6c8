"""Video weights of Wan in a video branch: same output, every weight accounted for."""

from dataclasses import replace

import pytest
import torch

from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.kv_cache import LayeredKVCache, TokenPositions
from mfcore.model.transformer import build_model
from mfcore.model.wan_weights import map_wan_weights
from mfcore.types import VIDEO, Condition, Stream
from mfcore.weights import load_strict

LATENTS, SIZE = 3, (4, 6)
CONFIG = ModelConfig(
    branches={VIDEO: BranchConfig(channels=16, size=SIZE, patch=(2, 2), data_std=None)},
    dim=96,
    layers=2,
    heads=4,
    word_heads=1,
    mlp_ratio=2.5,
    text_dim=32,
    chunk_seconds=0.5,
    window_chunks=2,
    rope_seconds_scale=6.0,
    layout="wan",
)


@pytest.fixture(scope="module")
def wan():
    """Build the real class at a tiny size with random weights."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan", reason="needs diffusers")
    torch.manual_seed(0)
    model = module.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, text_dim=32, ffn_dim=240, num_layers=2, freq_dim=256
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((0.3 if "norm" in name or "table" in name else 0.05) * torch.randn(p.shape))
    return model.eval()


def condition(caption: torch.Tensor) -> Condition:
    rows, length = caption.shape[:2]
    return Condition(
        caption=caption,
        caption_mask=torch.ones(rows, length, dtype=torch.bool),
        words=torch.randn(rows, 3, 32),
        words_mask=torch.ones(rows, 3, dtype=torch.bool),
        word_times=torch.tensor([[0.0, 0.2], [0.2, 0.4], [0.4, 0.5]], dtype=torch.float64).expand(rows, 3, 2),
        first_frame=torch.randn(rows, 16, *SIZE),
        voice=None,
        voice_mask=None,
    )


def predict(wan, cond: Condition, x: torch.Tensor, t: torch.Tensor, **options) -> torch.Tensor:
    """Return the velocity of one chunk without a sink, which Wan lacks, by a branch with the weights of ``wan``."""
    model = build_model(CONFIG, 1).eval()
    load_strict(model, map_wan_weights(wan.state_dict(), model.state_dict(), CONFIG, **options).weights, "Wan")
    chunk = Stream(
        latents=x.transpose(1, 2),
        times=(torch.arange(LATENTS, dtype=torch.float64) + 0.25) / 6,
        chunk=torch.zeros(LATENTS, dtype=torch.int64),
    )
    nowhere = TokenPositions(
        **dict.fromkeys(("chunk", "times", "ys", "xs", "branch"), torch.zeros(0, dtype=torch.int64))
    )
    cache = LayeredKVCache(window=2, sink=(), sink_positions=nowhere)
    level = {VIDEO: t[:, None]}
    found, _ = model({VIDEO: chunk}, level, level, cond, cache=cache)
    return found[VIDEO].transpose(1, 2)


def as_the_pipeline_calls(wan, caption: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the output for a caption that is padded with zeros to 512 tokens, without a mask, as in WanPipeline."""
    padded = torch.nn.functional.pad(caption, (0, 0, 0, 512 - caption.shape[1]))
    return wan(x, t * 1000, padded).sample


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 30, 511, 512])
def test_one_chunk_equals_the_output_of_the_pipeline(wan, length):
    """With words, which have no effect at the start. Absent caption tokens of a batch count as padding."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, LATENTS, *SIZE, generator=draw)
    caption, t = torch.randn(2, length, 32, generator=draw), torch.tensor([0.35, 0.8])
    expected = as_the_pipeline_calls(wan, caption, x, t)
    assert relative_difference(predict(wan, condition(caption), x, t), expected) < 1e-5
    assert float(expected.std()) > 0.1
    shorter = condition(caption)
    shorter.caption_mask[1, length // 2 :] = False
    expected[1:] = as_the_pipeline_calls(wan, caption[1:, : length // 2], x[1:], t[1:])
    if length > 1:
        assert relative_difference(predict(wan, shorter, x, t), expected) < 1e-5


@torch.no_grad()
def test_the_null_branch_equals_the_output_for_the_empty_prompt(wan):
    """The encoder returns one end token for it. Without the encoder the null branch reads padding alone."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, LATENTS, *SIZE, generator=draw)
    caption, t = torch.randn(2, 30, 32, generator=draw), torch.tensor([0.35, 0.8])
    end = torch.randn(1, 32, generator=draw)
    null = condition(caption).unconditional()
    expected = as_the_pipeline_calls(wan, end.expand(2, 1, 32), x, t)
    assert relative_difference(predict(wan, null, x, t, empty_caption=end), expected) < 1e-5
    padding = as_the_pipeline_calls(wan, torch.zeros(2, 1, 32), x, t)
    assert relative_difference(predict(wan, null, x, t), padding) < 1e-5


@torch.no_grad()
def test_small_activations_are_normalized_as_in_wan(wan):
    """An epsilon of 1e-5 instead of 1e-6 changes the output where activations are small."""
    draw = torch.Generator().manual_seed(2)
    x, caption = 1e-3 * torch.randn(1, 16, LATENTS, *SIZE, generator=draw), torch.randn(1, 30, 32, generator=draw)
    weights = {k: v.clone() for k, v in wan.state_dict().items()}
    try:
        wan.patch_embedding.bias.mul_(1e-3)
        wan.patch_embedding.weight.mul_(0.1)
        expected = as_the_pipeline_calls(wan, caption, x, torch.tensor([0.5]))
        assert relative_difference(predict(wan, condition(caption), x, torch.tensor([0.5])), expected) < 1e-5
    finally:
        wan.load_state_dict(weights)


def test_every_weight_is_accounted_for(wan):
    model = build_model(CONFIG, 1)
    extra = wan.state_dict() | {"blocks.0.attn2.add_k_proj.weight": torch.zeros(96, 96)}
    taken = map_wan_weights(extra, model.state_dict(), CONFIG)
    assert taken.weights.keys() == model.state_dict().keys()
    assert taken.loaded.keys() | set(taken.initialized) == taken.weights.keys()
    assert not taken.loaded.keys() & set(taken.initialized)
    sources = {name for names in taken.loaded.values() for name in names}
    assert sources == wan.state_dict().keys() and taken.skipped == ["blocks.0.attn2.add_k_proj.weight"]
    own = ("levels.interval", "levels.trust", "text.words", "text.norm_words", "text.nothing", "absent")
    assert all(any(part in name for part in own) for name in taken.initialized)


def test_weights_that_do_not_fit_are_listed_by_name(wan):
    model = build_model(CONFIG, 1)
    weights, own = wan.state_dict(), model.state_dict()
    with pytest.raises(ValueError, match=r"3 layers: \['blocks\.2\.attn1\.norm_k\.weight', .*missing"):
        map_wan_weights(weights, own, replace(CONFIG, layers=3))
    other = replace(CONFIG, mlp_ratio=3.0)
    with pytest.raises(
        ValueError, match=r"\(6 weights\): branches\.video\.blocks\.0\.mlp\.0\.bias \(240,\) there, \(288,\)"
    ):
        map_wan_weights(weights, build_model(other, 1).state_dict(), other)
    with pytest.raises(ValueError, match="use --preset base"):
        map_wan_weights(weights, own, replace(CONFIG, layout="own"))


def test_a_checkpoint_with_other_shapes_is_rejected_with_all_names():
    small, large = build_model(CONFIG, 0), build_model(replace(CONFIG, word_heads=2), 0)
    with pytest.raises(ValueError) as caught:
        load_strict(large, small.state_dict(), "the file")
    named = [n for n, p in large.named_parameters() if p.shape != small.state_dict()[n].shape]
    assert len(named) == 10 and all(name in str(caught.value) for name in named)
    deeper = build_model(replace(CONFIG, layers=3), 0)
    with pytest.raises(ValueError, match=r"another network: .*blocks\.2\.table\.weight.* missing"):
        load_strict(deeper, small.state_dict(), "the file")
