"""Tests of the model on a CUDA device: `pytest -m gpu tests/gpu`."""

from dataclasses import replace

import pytest
import torch

from mfcore.model.attention import attend
from mfcore.model.compile import compile_block
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.model.ring_cache import to_ring_cache
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, constant_levels, schedule
from mfcore.types import AUDIO, VIDEO
from tests.helpers.attention_inputs import random_qkv, visibility
from tests.helpers.streaming import MAX_TOKENS, SCHEDULE
from tests.helpers.tiny_model import SHAPES, TIMELINE, batch, network
from workflows.bench.stream import bench_stream
from workflows.bench.train import bench_train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("groups", [4, 2])
def test_flex_and_its_gradient_equal_the_dense_mask(groups):
    visible, results = visibility(chunks=20, tokens=33), []
    for backend in ("sdpa", "flex"):
        q, k, v = (x.to(DEVICE).requires_grad_() for x in random_qkv(visible, torch.float32, groups))
        out = attend(q, k, v, visible.mask(backend, DEVICE))
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, atol=2e-3, rtol=2e-3)  # products in TF32


def test_training_gradients_agree_between_backends():
    data, gradients = batch(rows=2, chunks=6).to(DEVICE), []
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    for attention in ("sdpa", "flex"):
        model = network(attention=attention).to(DEVICE)
        context = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None)
        sum(u.square().sum() for u in context.velocity(data.streams, t, t).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, dense in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], dense, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_a_stream_on_cuda_equals_the_stream_on_a_cpu():
    data, model, made = batch(rows=2, chunks=1), network(), []
    for device in ("cpu", "cuda"):
        here = data.to(device)
        context = DenoiserContext(model=model.to(device), cond=here.cond).prefill()
        context = context.map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))
        starts = noise_starts(TIMELINE, SHAPES, range(8), seed=0, samples=data.samples, like=here.cond.caption)
        made.append(join_chunks(c.clean for c in rollout(context, starts, SCHEDULE)))
    for m in (VIDEO, AUDIO):
        torch.testing.assert_close(made[1][m].latents.cpu(), made[0][m].latents, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_streaming_in_bfloat16_stays_near_float32():
    data, model, made = batch(rows=2, chunks=1).to(DEVICE), network().to(DEVICE), []
    for on in (False, True):
        starts = noise_starts(TIMELINE, SHAPES, range(2), seed=0, samples=data.samples.cpu(), like=data.cond.caption)
        with torch.autocast("cuda", torch.bfloat16, enabled=on):
            context = DenoiserContext(model=model, cond=data.cond).prefill()
            context = context.map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))
            plan = schedule(2, {VIDEO: 1.0, AUDIO: 1.0})
            made.append(join_chunks(c.clean for c in rollout(context, starts, plan)))
    for m in (VIDEO, AUDIO):
        gap = (made[0][m].latents - made[1][m].latents).square().mean().sqrt()
        assert gap < 0.1 * made[0][m].latents.std()


def stream_on_cuda(model, net, data, chunks: int = 14):
    """Stream a clip; caption and transcript change at chunk 8."""
    other = replace(data.cond, caption=-data.cond.caption, word_times=data.cond.word_times + 2.5)
    conds = [data.cond] * 8 + [other] * (chunks - 8)
    context = (
        DenoiserContext(model=model, cond=data.cond)
        .prefill()
        .map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))
    )
    starts = noise_starts(TIMELINE, SHAPES, range(chunks), seed=0, samples=data.samples.cpu(), like=data.cond.caption)
    assert next(net.parameters()).is_cuda
    return join_chunks(c.clean for c in rollout(context, starts, SCHEDULE, conds=conds))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@torch.no_grad()
def test_cuda_graphs_equal_the_eager_network(dtype):
    """Include the filling window: every shape is captured once and replayed."""
    data, net = batch(rows=2, chunks=1).to(DEVICE), network(window=3).to(DEVICE)
    graphed = CUDAGraphModel(net)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        plain = stream_on_cuda(net, net, data)
        for _ in range(2):  # a freed ring must leave no graph behind
            again = stream_on_cuda(graphed, net, data)
            for m in (VIDEO, AUDIO):
                torch.testing.assert_close(again[m].latents, plain[m].latents, atol=1e-4, rtol=1e-4)
    assert 0 < graphed.num_captures < 2 * 3 * 14


@torch.no_grad()
def test_memory_does_not_grow_while_graphs_replay():
    data, net = batch(rows=1, chunks=1).to(DEVICE), network(window=3).to(DEVICE)
    context = DenoiserContext(model=CUDAGraphModel(net), cond=data.cond).prefill()
    context = context.map_caches(lambda cache: to_ring_cache(cache, MAX_TOKENS))
    starts = noise_starts(TIMELINE, SHAPES, range(200), seed=0, samples=data.samples.cpu(), like=data.cond.caption)
    allocated = []
    for _ in rollout(context, starts, SCHEDULE):
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert max(allocated[100:]) <= max(allocated[30:100])


@torch.no_grad()
def test_compiled_blocks_stream_the_same_clip_with_and_without_graphs():
    data, net = batch(rows=2, chunks=1).to(DEVICE), network(window=3).to(DEVICE)
    plain = stream_on_cuda(net, net, data)
    net.code = compile_block()
    for model in (net, CUDAGraphModel(net)):
        made = stream_on_cuda(model, net, data)
        for m in (VIDEO, AUDIO):
            torch.testing.assert_close(made[m].latents, plain[m].latents, atol=2e-3, rtol=2e-3)  # products in TF32


def test_compiled_blocks_give_the_same_gradients():
    data, gradients = batch(rows=2, chunks=4).to(DEVICE), []
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    for on in (False, True):
        model = network().to(DEVICE)
        model.code = compile_block() if on else model.code
        context = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None)
        sum(u.square().sum() for u in context.velocity(data.streams, t, t).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("switches", [{"compile": True}, {"graphs": True}, {"compile": True, "graphs": True}], ids=str)
def test_inference_optimizations_are_faster(switches):
    found = bench_stream(preset="full", size=(192, 336), steps=4, chunks=60, device="cuda", **switches)
    assert found["switch_speedup"] > 1.02
    assert "compile" in switches or found["switch_gap"] < 1e-3  # compiled blocks round bfloat16 at other points


@pytest.mark.parametrize(("size", "min_fps"), [((192, 336), 60), ((480, 768), 24), ((704, 1280), 7)])
def test_full_preset_streams_at_twice_the_speed_of_the_paper(size, min_fps):
    found = bench_stream(preset="full", size=size, steps=4, chunks=60, device="cuda", graphs=True)
    assert found["fps"] >= min_fps
    assert found["late_over_early"] <= 1.05 and found["memory_late_over_early"] == pytest.approx(1.0, abs=1e-3)
    assert size != (192, 336) or found["first_chunk_s"] <= 0.3


def test_base_trains_at_45_percent_model_flops_utilization():
    found = bench_train(stage="joint", preset="base", tokens=15_000, rounds=3, turn=1, variants=["ray_torch"])
    assert found["mfu"] >= 0.45
