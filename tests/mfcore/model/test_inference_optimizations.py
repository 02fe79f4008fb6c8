"""Compiled blocks and recorded passes give the same results."""

from dataclasses import replace

import pytest
import torch

from mfcore.model import compile as compile_module
from mfcore.model.compile import CompilerNotFoundError, check_compiler, compile_block
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.model.lora import FakeScoreConfig, LoRAModel
from mfcore.model.transformer import find_transformers
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext, constant_levels
from mfcore.types import VIDEO
from tests.helpers.op_recorder import record_after_warm_up
from tests.helpers.streaming import SCHEDULE, assert_same, starts, streamed, with_ring_cache
from tests.helpers.tiny_model import batch, network

try:
    check_compiler(torch.device("cpu"))
    NO_COMPILER = ""
except CompilerNotFoundError as error:
    NO_COMPILER = str(error)


def gradients(model, data) -> dict[str, torch.Tensor]:
    """Return velocities, and the gradient of every weight that has one."""
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    u = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None).velocity(data.streams, t, t)
    sum(v.square().mean() for v in u.values()).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {m: v.detach() for m, v in u.items()} | found


def assert_compiled_equals_eager(backend: str, changes: dict, tolerance: float, *modalities: str) -> None:
    answers = []
    for on in (False, True):
        model = network(*modalities, **changes)
        model.code = compile_block(backend) if on else model.code
        answers.append(gradients(model, batch(2, 3, *modalities)))
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) > 20
    for name, value in answers[0].items():
        torch.testing.assert_close(answers[1][name], value, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_a_block_compiles_to_one_graph():
    """Use backend ``eager``, which fails on a graph break."""
    assert_compiled_equals_eager("eager", {"layers": 3}, 1e-6, VIDEO)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
@pytest.mark.parametrize("changes", [{}, {"layout": "wan"}], ids=str)
def test_compiled_blocks_equal_eager_blocks(changes):
    assert_compiled_equals_eager("inductor", changes, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
@torch.no_grad()
def test_a_compiled_stream_equals_the_eager_stream():
    model, data = network(window=3), batch()
    context = DenoiserContext(model=model, cond=data.cond)
    plain = streamed(context, data)
    model.code = compile_block()
    assert_same(plain, streamed(context, data), 3e-5)


@pytest.mark.slow
def test_low_rank_networks_can_be_compiled():
    fake = LoRAModel(network(layers=1), FakeScoreConfig(rank=2), 0)
    torch.nn.init.normal_(fake.adapted.branch(VIDEO).block(0).qkv.up.weight, generator=torch.Generator().manual_seed(1))
    plain = gradients(fake.adapted, batch(1, 2))
    fake.zero_grad()
    for part in find_transformers(fake):
        part.code = compile_block("eager")
    for name, value in gradients(fake.adapted, batch(1, 2)).items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-6)


def test_a_missing_compiler_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(compile_module.shutil, "which", {}.get)
    with pytest.raises(ValueError, match=r"g\+\+.* install it"):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("changes", [{}, {"coupled": False}, {"layout": "wan"}, {"cross_bias": -4.0}], ids=str)
@torch.no_grad()
def test_recorded_passes_equal_eager_passes(changes):
    """Vary shapes (filling window, audio latents per chunk), and change caption and transcript at chunk 7."""
    model, data = network(window=3, **changes), batch()
    other = replace(data.cond, caption=-data.cond.caption, word_times=data.cond.word_times + 2.5)
    conds = [data.cond] * 7 + [other] * 9
    plain = streamed(DenoiserContext(model=model, cond=data.cond), data, conds=conds, chunks=16)
    graphed = CUDAGraphModel(model, record_after_warm_up)
    assert_same(plain, streamed(DenoiserContext(model=graphed, cond=data.cond), data, conds=conds, chunks=16))
    assert graphed.num_captures < 16  # of 48 passes


@torch.no_grad()
def test_two_rings_with_few_graphs_do_not_mix():
    model, data = network(window=2), batch()
    graphed = CUDAGraphModel(model, record_after_warm_up, max_graphs=3)
    plain = streamed(DenoiserContext(model=model, cond=data.cond, guidance=2.0), data)
    assert_same(plain, streamed(DenoiserContext(model=graphed, cond=data.cond, guidance=2.0), data), 1e-4)


@torch.no_grad()
def test_a_snapshot_of_a_recorded_stream_continues_it():
    model, data = network(window=2), batch()
    context = DenoiserContext(model=CUDAGraphModel(model, record_after_warm_up), cond=data.cond)
    whole = streamed(context, data)
    chunks = rollout(with_ring_cache(context), starts(data), SCHEDULE)
    for _ in range(4):
        chunk = next(chunks)
    kept = chunk.context.snapshot()
    rest = join_chunks(c.clean for c in rollout(with_ring_cache(kept), starts(data, 4, 5), SCHEDULE))
    late = whole[VIDEO].chunk >= 4
    torch.testing.assert_close(rest[VIDEO].latents, whole[VIDEO].latents[:, late], atol=1e-4, rtol=1e-4)
