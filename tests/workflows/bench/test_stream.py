"""Check the result of `mfctl bench stream`: keys, consistency of numbers, messages for invalid options."""

import json
from dataclasses import replace

import pytest
import torch

from mfcore.model import compile
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.model.flops import chunk_flops
from mfcore.types import AUDIO, VIDEO
from tests.helpers.op_recorder import record_operators
from workflows.bench import roofline, stream
from workflows.bench.random_network import random_network, random_network_bytes
from workflows.bench.stream import bench_stream, memory_parts
from workflows.bench.stream_table import format_table
from workflows.bench.train import bench_train
from workflows.config.latent_shapes import geometry_for_preset
from workflows.config.presets import build_preset as build
from workflows.training import memory_check

SMALL = ("model.dim=32", "model.layers=2", "model.heads=2")
EXPECTED_KEYS = {
    "fps",
    "cache_passes",
    "first_chunk_s",
    "chunk_ms_p50",
    "chunk_ms_p99",
    "late_over_early",
    "peak_memory_bytes",
    "flops_per_s",
    "ratio_to_matmul",
    "cached_speedup",
}


@pytest.fixture(scope="module", autouse=True)
def short():
    """Use small matrices and short streams; these tests check correctness, not noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "CPU_MATMUL_SIZE", 128)
        patch.setattr(stream, "EARLY_CHUNKS", 6)
        patch.setattr(stream, "CACHED_AT", 10)
        yield


@pytest.fixture(scope="module")
def result():
    return bench_stream(chunks=9, rounds=2, steps=2, device="cpu", sets=SMALL)


def test_result_has_the_documented_keys(result):
    assert result.keys() >= EXPECTED_KEYS
    assert json.loads(json.dumps(result)) == result
    assert 0 < result["fps"] < result["fps_ceiling"] and 0 < result["ratio_to_matmul"] < 1
    assert result["fps"] == pytest.approx(12e3 / result["chunk_ms_p50"])
    assert result["decode_ms"].keys() == {VIDEO, AUDIO}
    assert "paper none at this size" in format_table(result)


def test_cached_chunk_equals_recomputed_chunk(result):
    assert result["cached_gap"] < 1e-4
    assert result["cached_speedup"] > result["cached_speedup_prefix_once"]


def test_memory_does_not_grow_along_the_stream(result):
    assert result["memory_late_over_early"] == pytest.approx(1.0, abs=0.002)


def test_flops_are_those_of_a_chunk_at_the_padded_size():
    plan = stream.plan_stream_bench(
        preset="full",
        size=(192, 336),
        steps=4,
        chunks=500,
        rounds=5,
        device="cpu",
        precision="bf16",
        sets=(),
    )
    assert plan.geometry.padded(plan.size) == (192, 352)
    assert stream.chunk_workload(plan).tokens == {VIDEO: 3 * 6 * 11, AUDIO: 11}
    assert chunk_flops(plan.model, stream.chunk_workload(plan), 4) == pytest.approx(12.0e12, rel=0.05)
    assert memory_parts(plan)["weights"] == pytest.approx(2 * 13.9e9, rel=0.05)


def test_random_network_bytes_equal_the_allocated_bytes():
    model = build("tiny", "joint", geometry_for_preset("tiny").shapes((64, 64))).model
    for dtype in (torch.float32, torch.bfloat16):
        net = random_network(model, torch.device("cpu"), dtype)
        assert sum(p.nbytes for p in net.parameters()) == random_network_bytes(model, dtype)
        assert net.branch(VIDEO).head.weight.dtype == torch.float32
        assert net.branch(VIDEO).block(0).qkv.weight.dtype == dtype


def test_streaming_in_bfloat16():
    found = bench_stream(chunks=8, rounds=1, steps=1, device="cpu", precision="bf16", sets=SMALL)
    assert found["precision"] == "bfloat16" and 0 < found["cached_gap"] < 0.5


def test_model_beyond_memory_is_rejected_before_allocation(monkeypatch):
    monkeypatch.setattr(stream, "available_memory", lambda device: 8_000_000_000)
    monkeypatch.setattr(stream, "random_network", lambda *_: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=r"full at 192x336 needs 5\d\.\d GB .* 8\.0 GB are free. Use --preset"):
        bench_stream(preset="full", device="cpu")
    assert (
        memory_check.available_memory(torch.device("cpu")) is None
        or memory_check.available_memory(torch.device("cpu")) > 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": 7}, "--chunks at least 8"),
        ({"steps": 0}, "--steps and --rounds must be at least 1"),
        ({"size": (0, 64)}, "both edges must be positive"),
        ({"preset": "tny"}, "unknown preset 'tny'"),
        ({"sets": ["model.layer=1"]}, "model.layer"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        bench_stream(**{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_rejected():
    with pytest.raises(ValueError, match="--device cuda"):
        bench_stream(device="cuda")


def test_training_beyond_memory_is_rejected_with_alternatives(monkeypatch):
    monkeypatch.setattr(memory_check, "available_memory", lambda device: 60_000_000_000)
    config = build("full", "joint", geometry_for_preset("full").shapes((192, 336)))
    eight = replace(config, engine=replace(config.engine, workers=8, zero_stage=1))
    with pytest.raises(
        ValueError, match=r"13\.9B parameters on 8 rank\(s\) at ZeRO stage 1 needs 18\d\.\d GB .*60\.0 GB"
    ) as error:
        memory_check.require_training_memory(eight, "cpu")
    assert "--preset base (39" in str(error.value) and "zero_stage=3" not in str(error.value)
    monkeypatch.setattr(memory_check, "available_memory", lambda device: 100_000_000_000)
    with pytest.raises(ValueError, match=r"Use --set engine\.zero_stage=3 \(8\d\.\d GB\), or --preset base"):
        memory_check.require_training_memory(eight, "cpu")
    memory_check.require_training_memory(replace(eight, engine=replace(eight.engine, zero_stage=3)), "cpu")
    monkeypatch.setattr(memory_check, "available_memory", lambda device: 1_000_000)
    with pytest.raises(memory_check.InsufficientMemoryError, match="needs 180"):
        memory_check.require_training_memory_on_all_ranks(eight)


@pytest.mark.slow
def test_cuda_graphs_are_measured_against_the_eager_stream(monkeypatch):
    """Replay the recorded passes operator by operator on the CPU."""
    monkeypatch.setattr(stream, "check_feasible", lambda plan: None)
    monkeypatch.setattr(
        stream, "apply_inference_optimizations", lambda net, **switches: CUDAGraphModel(net, record_operators)
    )
    found = bench_stream(chunks=8, rounds=2, steps=2, device="cpu", graphs=True, sets=SMALL)
    assert found["graphs"] and not found["compile"]
    assert found["switch_gap"] < 1e-5 and found["switch_speedup"] > 0
    assert "graphs" in format_table(found)


def test_inapplicable_switches_are_rejected(monkeypatch):
    with pytest.raises(ValueError, match="--graphs records CUDA graphs, and this stream runs on the cpu"):
        bench_stream(device="cpu", graphs=True)
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a compiler"):
        bench_stream(device="cpu", compile=True)
    with pytest.raises(ValueError, match="needs a compiler"):
        bench_train(sets=["engine.compile=true"], variants=["ray_torch"])
    with pytest.raises(ValueError, match=r"set engine\.compile=false, or engine\.zero_stage"):
        bench_train(sets=["engine.compile=true", "engine.zero_stage=3"])
    with pytest.raises(ValueError, match=r"engine\.sequence 2 must divide engine\.workers, a number: got 1"):
        bench_train(sets=["engine.sequence=2"])
    with pytest.raises(ValueError, match=r"engine\.sequence 3 splits attention heads: it must divide model\.heads 4"):
        bench_train(workers=3, sets=["engine.sequence=3"])
