"""Worker of ``mfctl bench train``: all variants run the same steps, interleaved.

Rounds of a few steps alternate between the variants (A B C A B C), so that other load affects all alike. A variant is
compared with the reference loop of the same round. Variants with an engine run ``workflows.training.loop`` with the
networks, batches and prefetching of a training run. They log after every round, more often than a run does.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from workflows.bench import roofline
from workflows.bench.matmul_overhead import MatmulOverhead, measure_matmul_overhead
from workflows.bench.reference_loop import reference_loop
from workflows.bench.variants import RoundTiming, Variant, VariantRunner, synthetic_batches, to_device
from workflows.config.run import RunConfig
from workflows.training.loop import count_tokens
from workflows.training.networks import build_initial_network
from workflows.utils import distributed, timing

REFERENCE_VARIANT = "bare"
PROBE_STEPS = 2  # steps before the first round; the second one runs with allocated moments


@dataclass(frozen=True, kw_only=True)
class TrainBenchPlan:
    """Work of the ranks."""

    config: RunConfig
    variants: Mapping[str, Variant]
    rounds: int
    turn: int  # steps of a variant per round
    threads: int  # per process, on a CPU
    profiled: tuple[str, ...] = ()  # variants to profile after the last round


@dataclass(frozen=True, kw_only=True)
class TrainBenchResult:
    """Measurements of all rounds, from rank 0."""

    turns: dict[str, list[RoundTiming]]  # per round, of the slowest rank
    state_bytes: dict[str, int]  # weights, gradients, moments and EMA, per rank
    over_products: MatmulOverhead
    flops_per_s: list[float]  # of large matrix products, per rank, with all ranks busy
    flops: int  # per step and rank
    tokens: int  # per step and rank
    parameters: int  # of the student
    threads: int
    peak_memory_bytes: int  # per rank, all variants together
    profiles: dict[str, str]


def run_rank(plan: TrainBenchPlan) -> TrainBenchResult:
    """Build, probe and time all variants on this rank."""
    if distributed.local_device().type == "cpu":
        torch.set_num_threads(plan.threads)
    batches = synthetic_batches(plan.config)
    first = [to_device(batches.micro_batches(step)) for step in range(PROBE_STEPS)]
    # equal useful FLOPs; the FLOP counter cannot look into compiled blocks
    dense = replace(
        plan.config,
        model=replace(plan.config.model, attention="sdpa"),
        engine=replace(plan.config.engine, compile=False),
    )
    flops = roofline.count_flops(lambda: reference_loop(dense).run(first[:1], 0, 1))
    runners: dict[str, VariantRunner] = {}
    state_bytes: dict[str, int] = {}
    for name, variant in plan.variants.items():
        gc.collect()
        before = roofline.live_tensor_bytes()
        runners[name] = VariantRunner(plan.config, variant)
        state_bytes[name] = runners[name].measure_peak_memory(first) - before
    timings, rates = run_rounds(plan, runners)
    return TrainBenchResult(
        turns=timings,
        state_bytes=state_bytes,
        over_products=measure_matmul_overhead(dense, first[0][0], plan.rounds),
        flops_per_s=rates,
        flops=flops,
        tokens=sum(count_tokens(plan.config, micro) for micro in first[0]),
        parameters=sum(p.numel() for p in build_initial_network(plan.config, {}).parameters()),
        threads=torch.get_num_threads(),
        peak_memory_bytes=max(distributed.all_gather_object(timing.peak_bytes())),
        profiles={name: profile_round(runners[name], plan.turn) for name in plan.profiled},
    )


def run_rounds(
    plan: TrainBenchPlan, runners: Mapping[str, VariantRunner]
) -> tuple[dict[str, list[RoundTiming]], list[float]]:
    """Return the timings of every variant and the matrix product rate of every round."""
    timings: dict[str, list[RoundTiming]] = {name: [] for name in runners}
    rates: list[float] = []
    for number in range(plan.rounds + 1):
        for name, runner in runners.items():
            by_rank = distributed.all_gather_object(runner.run_round(plan.turn))
            if number:  # round 0 warms up
                timings[name].append(max(by_rank, key=lambda timing: timing.step_s))
        distributed.barrier()
        rate = roofline.matmul_flops_per_s(distributed.local_device(), plan.config.engine.autocast or torch.float32)
        slowest_rate = min(distributed.all_gather_object(rate))
        if number:
            rates.append(slowest_rate)
    return timings, rates


def profile_round(runner: VariantRunner, steps: int) -> str:
    """Return a table of the eight most expensive operators of one round."""
    gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if gpu else [])
    with torch.profiler.profile(activities=kinds) as profile:
        runner.run_round(steps)
    return profile.key_averages().table(
        sort_by="self_cuda_time_total" if gpu else "self_cpu_time_total", row_limit=8, max_name_column_width=48
    )
