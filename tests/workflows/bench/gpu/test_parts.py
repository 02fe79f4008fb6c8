"""Check the parts of `mfctl bench gpu` on the CPU: cases, counted floors, profiles, worker processes."""

import io
import json
import math
import time
from dataclasses import replace

import pytest
import torch

from workflows.bench.gpu import facts, parity, profiling, streaming, training
from workflows.bench.gpu.floors import H200, chunk_work, count_launches
from workflows.bench.gpu.memory import require_device_memory
from workflows.bench.gpu.profiling import Kernel
from workflows.bench.gpu.targets import TARGETS
from workflows.bench.stream import chunk_workload, plan_stream_bench
from workflows.utils import case_worker
from workflows.utils.case_worker import BenchCase, CaseSkippedError, WorkerOptions

CPU = torch.device("cpu")
OPTIONS = WorkerOptions(device=CPU, preset="tiny")


def reports(cases, options=OPTIONS):
    stream = io.StringIO()
    code = case_worker.run_cases(cases, options, stream)
    return code, [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_failed_case_does_not_stop_the_others():
    def fail():
        raise RuntimeError("the kernel\ndoes not exist")

    code, found = reports(
        [
            BenchCase(name="bad", run=fail),
            BenchCase(name="graphs", run=dict, needs_cuda="CUDA graphs need a GPU"),
            BenchCase(name="good", run=lambda: {"value": math.nan}),
        ]
    )
    ended = {r["case"]: r for r in found if r["status"] != "started"}
    assert code == 0
    assert ended["bad"]["reason"] == "RuntimeError: the kernel does not exist"
    assert ended["graphs"]["status"] == "skipped" and "this runs on the cpu" in ended["graphs"]["reason"]
    assert ended["good"]["status"] == "done" and ended["good"]["result"] == {"value": None}


def test_finished_cases_and_those_without_time_are_left_out():
    options = WorkerOptions(device=CPU, deadline=time.monotonic() + 5, done=frozenset({"one"}))
    slow = BenchCase(name="two", run=dict, least_seconds=60)
    _, found = reports([BenchCase(name="one", run=dict), slow], options)
    assert [(r["case"], r["status"]) for r in found] == [("two", "cut")]
    assert "it needs 60 s" in found[0]["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_named_in_one_line(capfd):
    code = case_worker.main(lambda options: [BenchCase(name="one", run=dict)], ["--device", "cuda"])
    (line,) = capfd.readouterr().out.splitlines()
    assert code == case_worker.NO_DEVICE
    assert json.loads(line)["reason"].startswith("no CUDA device: torch")


def test_too_little_memory_is_named():
    with pytest.raises(CaseSkippedError, match=r"it needs 1000000\.0 GB of memory, and .* GB are free"):
        require_device_memory(CPU, 10**15)


@pytest.mark.parametrize(("version", "text"), [("2.11.0+cu130", ""), ("2.13.0", ""), ("2.9.1", "checked with 2.11")])
def test_another_version_of_torch_is_named(version, text):
    assert text in facts.version_warning(version)
    assert bool(facts.version_warning(version)) == bool(text)


def test_names_of_cases_are_unique_and_contain_those_of_the_targets():
    names = {
        "stream": [case.name for case in streaming.stream_cases(None)],
        "train": [case.name for case in training.train_cases(None)],
    }
    for part, own in names.items():
        assert len(set(own)) == len(own)
        wanted = {case for t in TARGETS.values() if t.part == part for case in (t.case, t.over) if case}
        assert wanted <= set(own)
    for module in (streaming, training, profiling, parity, facts):
        assert len(list(module.cases(OPTIONS))) > 1


def test_floor_of_a_chunk_of_the_full_preset():
    """At the smallest size the weights bound one stream, and the products eight of them."""
    plan = plan_stream_bench(
        preset="full", size=(192, 336), steps=4, chunks=40, rounds=1, device="cpu", precision="bf16", sets=()
    )
    model, load = replace(plan.model, layers=1), chunk_workload(plan)
    one, eight = (chunk_work(model, load, steps=4, element=2, rows=rows, launches=1000) for rows in (1, 8))
    assert eight.flops == 8 * one.flops and one.bytes < eight.bytes < 1.5 * one.bytes
    floor = one.floor(H200)
    assert floor["floor_s"] == floor["bytes_s"] > floor["products_s"]
    assert floor["launches_s"] == pytest.approx(5e-3)
    assert eight.floor(H200)["floor_s"] == eight.floor(H200)["products_s"]


def test_launches_are_operators_that_run_a_kernel():
    x = torch.ones(4, 4)
    assert count_launches(CPU, lambda: (x @ x).t().reshape(2, 8).add_(1.0)) == 3  # product, copy of the view, sum


def test_profile_of_kernels():
    kernels = [
        Kernel(name="sm90_gemm", start=0.0, duration=10.0),
        Kernel(name="flash_fwd", start=15.0, duration=5.0),
        Kernel(name="elementwise", start=18.0, duration=4.0),
        Kernel(name="sm90_gemm", start=24.0, duration=1.0),
    ]
    found = profiling.summarize(kernels)
    assert found["kernels"] == 4 and found["gap_s"] == pytest.approx(7e-6)
    assert found["share_by_kind"] == {"attention": 0.25, "elementwise and reductions": 0.2, "products": 0.55}
    assert found["top"][0] == {"ms": 0.011, "share": 0.55, "calls": 2, "name": "sm90_gemm"}


def test_parity_reports_a_difference():
    a, b = {"x": torch.zeros(2)}, {"x": torch.tensor([0.0, 0.1])}
    assert parity.assert_close(a, a, 1e-4) == {"largest_difference": 0.0, "tolerance": 1e-4}
    with pytest.raises(AssertionError, match="x: "):
        parity.assert_close(a, b, 1e-4)


@pytest.mark.parametrize("name", ["attention = float64", "bf16 stream near fp32"])
def test_parity_checks_pass_on_the_cpu(name):
    assert parity.CHECKS[name].run(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, check in parity.CHECKS.items() if not check.needs_cuda])
def test_every_parity_check_without_cuda_passes_on_the_cpu(name):
    assert parity.CHECKS[name].run(CPU)
