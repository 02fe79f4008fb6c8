"""Check the result of `mfctl bench train`: keys, equal work of the variants, FLOP and byte counts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mfcore.model.attention import additive_mask
from workflows.bench import roofline, variants
from workflows.bench import train as bench
from workflows.bench.train import bench_config, bench_train, format_table
from workflows.training.loop import count_tokens

SMALL = ("model.dim=32", "model.layers=1", "model.heads=2", "data.chunks=[2,2]")
EXPECTED_KEYS = {"step_s", "overhead_zero1", "data_wait_share", "tokens_per_s", "mfu", "peak_memory_bytes"}


@pytest.fixture(scope="module", autouse=True)
def plain_torch():
    """Hide ray and deepspeed, and use small matrices."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(bench, "_installed", lambda name: False)
    monkeypatch.setattr(roofline, "CPU_MATMUL_SIZE", 128)
    yield
    monkeypatch.undo()


@pytest.fixture(scope="module")
def joint():
    return bench_train(stage="joint", tokens=50, rounds=2, turn=1, sets=SMALL)


def test_without_ray_the_reference_and_training_loops_are_measured(joint):
    assert list(joint["step_s"]) == ["bare", "torch"]
    assert joint.keys() >= EXPECTED_KEYS
    assert joint["step_s"]["bare"] > 0 and joint["overhead"]["torch"] > 0
    assert joint["forward_over_products"] > 1 and joint["block_over_products"] > 1
    assert 0 < joint["mfu"] < 1 and 0 <= joint["data_wait_share"] < 1
    assert joint["not_measured"] == {
        "ray_torch": "not measured: needs ray",
        **{f"ray_zero{i}": "not measured: needs ray and deepspeed" for i in range(4)},
    }
    assert json.loads(json.dumps(joint)) == joint
    table = format_table(joint)
    assert all(name in table for name in ("bare", "torch", "ray_zero3", "limit"))


def test_both_loops_have_equal_losses(joint):
    assert joint["loss_gap"]["torch"] < 1e-5


def test_state_bytes_are_weights_gradients_two_moments_and_ema(joint):
    exact = 5 * 4 * joint["parameters"]
    assert exact <= joint["model_state_bytes"]["torch"] < 1.03 * exact


@pytest.mark.slow
def test_mutual_stage_is_measured_against_dmd_and_a_full_copy():
    low = [*SMALL, "fake.rank=1", "objective.fake_updates=2", "objective.share_history=true"]
    result = bench_train(
        stage="mutual", tokens=1, rounds=1, turn=1, sets=low, variants=["ray_torch", "dmd1", "full_copy"]
    )
    assert result["batch"] == 4 and result["loss_gap"]["torch"] < 1e-5
    config = bench_config(stage="mutual", preset="tiny", workers=1, tokens=1, sets=SMALL)
    assert [config.objective.row_kind(i, 0) for i in range(4)] == list(config.objective.rows)
    assert config.objective.dmd_scale(0) == 1
    # student and fake score with gradients and moments, EMA and teacher
    whole = (4 + 4 + 1 + 1) * 4 * result["parameters"]
    assert 0.9 * whole < result["model_state_bytes"]["dmd1"] < 1.03 * whole  # unused weights have no moments
    without_teacher = 0.9 * whole
    full = result["model_state_bytes"]["full_copy"]
    assert 0.9 * without_teacher < full < 1.1 * without_teacher  # samples are kept for the second fake-score update
    assert result["model_state_bytes"]["torch"] < 0.75 * full


@pytest.mark.parametrize("workers", [1, 2])
def test_batch_has_the_fewest_clips_with_the_requested_tokens(workers):
    config = bench_config(stage="joint", preset="tiny", workers=workers, tokens=3000, sets=())
    rows = config.data.batch // workers
    batches = variants.synthetic_batches(config, workers - 1, workers)
    (micro,) = batches.micro_batches(0)
    assert len(micro.samples) == rows
    tokens = count_tokens(config, micro)
    assert 3000 <= tokens < 3000 + tokens / rows


def test_flops_equal_the_formula():
    a, b = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    assert roofline.count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 7 * 5 * 3
    q = torch.randn(1, 2, 8, 16)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert roofline.count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 8 * 8 * 16)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    for mask in (causal, additive_mask(causal)):
        assert roofline.count_flops(lambda mask=mask: attention(q, q, q, attn_mask=mask)) == 2 * (2 * 2 * 36 * 16)
    trained = q.clone().requires_grad_()
    backward = lambda: attention(trained, q, q, attn_mask=causal).sum().backward()
    assert roofline.count_flops(backward) == 3 * 2 * (2 * 2 * 36 * 16)


def test_live_bytes_count_shared_storage_once():
    before = roofline.live_tensor_bytes()
    block = torch.zeros(1 << 20)
    views = [block[i:] for i in range(3)]
    views.append(FakeTensorMode().from_tensor(block))
    assert roofline.live_tensor_bytes() - before == 4 << 20
    del block, views


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["ray_zero4"]}, "unknown variant 'ray_zero4' of stage joint: choose from bare, ray_torch"),
        ({"variants": ["dmd5"]}, "unknown variant 'dmd5' of stage joint"),
        ({"workers": 0}, "--workers and --tokens must be at least 1, got 0 and 3000"),
        ({"rounds": 0}, "--rounds and --turn must be at least 1"),
        ({"sets": ["data.chunks=[21,21]"]}, "the clips of the bench hold 20 chunks"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        bench_train(**options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_with_zero1_adds_at_most_five_percent(workers):
    done = subprocess.run(
        [sys.executable, "-m", "workflows.cli", "bench", "train", "--workers", str(workers), "--turn", "1", "--json"]
        + ["--rounds", "7"],
        env=os.environ | {"OMP_NUM_THREADS": ""},
        capture_output=True,
        check=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert list(result["step_s"]) == list(bench.VARIANTS) and not result["not_measured"]
    assert max(result["loss_gap"].values()) < 1e-4
    assert result["bar"] is not None and result["overhead_zero1"] <= result["bar"]
    assert result["data_wait_share"] <= 0.02


@pytest.mark.slow
def test_compiled_blocks_are_measured():
    result = bench_train(stage="joint", tokens=50, rounds=1, turn=1, sets=(*SMALL, "engine.compile=true"))
    assert list(result["step_s"]) == ["bare", "torch"]
    assert result["loss_gap"]["torch"] < 1e-4
    assert result["flops"] > 0
