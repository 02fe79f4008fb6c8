"""What every rank of ``mfctl bench train`` does: the same steps by every variant, in turns.

All variants are built in the same processes and take turns of a few steps, A B C A B C ..., so whatever else happens on
the machine hits all of them alike; a variant is compared with the bare loop of the same round. The variants with an
engine are ``workflows.loop.run_loop`` itself with networks, batches and prefetching of a training run. A turn logs at
its end, so more often than a run does.
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
PROBE_STEPS = 2  # steps before the first round: the second one sees the moments that the first one has made


@dataclass(frozen=True, kw_only=True)
class TrainBenchPlan:
    """What the ranks are asked for."""

    config: RunConfig
    variants: Mapping[str, Variant]
    rounds: int
    turn: int  # steps of a variant in a round
    threads: int  # of a process, on a CPU
    profiled: tuple[str, ...] = ()  # variants of which a profile is made after the last round


@dataclass(frozen=True, kw_only=True)
class TrainBenchResult:
    """What rank 0 knows at the end."""

    turns: dict[str, list[RoundTiming]]  # one for each round, of the rank that took longest
    state_bytes: dict[str, int]  # weights, gradients, moments and average, per rank
    over_products: MatmulOverhead
    flops_per_s: list[float]  # of large matrix products, per rank, all ranks at once
    flops: int  # of a step, per rank
    tokens: int  # of a step, per rank
    parameters: int  # of the student
    threads: int
    peak_memory_bytes: int  # of a rank, all variants together
    profiles: dict[str, str]


def run_rank(plan: TrainBenchPlan) -> TrainBenchResult:
    """Everything, on one rank."""
    if distributed.local_device().type == "cpu":
        torch.set_num_threads(plan.threads)
    batches = synthetic_batches(plan.config)
    first = [to_device(batches.micro_batches(step)) for step in range(PROBE_STEPS)]
    dense = replace(plan.config, model=replace(plan.config.model, attention="sdpa"))  # what is useful is the same
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
    """The turns of every variant, and the rate of matrix products in every round."""
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
    """Where a turn's time goes: the eight dearest operators."""
    gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if gpu else [])
    with torch.profiler.profile(activities=kinds) as profile:
        runner.run_round(steps)
    return profile.key_averages().table(
        sort_by="self_cuda_time_total" if gpu else "self_cpu_time_total", row_limit=8, max_name_column_width=48
    )
