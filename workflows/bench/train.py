"""Time training steps against a reference loop and the FLOP limit (``mfctl bench train``).

One run measures all variants in the same processes, interleaved (``workflows.bench.train_worker``):

bare            plain PyTorch loop (``workflows.bench.reference_loop``)
ray_torch       the training loop with TorchEngine under Ray Train
ray_zero0 .. 3  the training loop with DeepSpeedEngine at that ZeRO stage under Ray Train
dmd5, dmd1      stage mutual, on request: reference loop of DMD with self-forcing and a separate frozen teacher, with
                five or one updates of the fake score per step (as Self-Forcing; as the mutual stage)
full_copy       stage mutual with fake.rank, on request: reference loop with a full copy as fake score
compiled        on request: reference loop with compiled blocks

Batches are noise in the latent shapes of the preset; no dataset is needed. Variants that need a missing package (ray,
deepspeed) are listed as not measured. Without ray, ``torch`` replaces ``ray_torch``.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from statistics import median
from typing import Literal, TypedDict, cast

import torch

from mfcore.errors import UserInputError
from mfcore.model.compile import check_compiler
from mfcore.objectives.mutual_config import MutualConfig
from workflows.bench import synthetic_data
from workflows.bench.launcher import run_on_ranks
from workflows.bench.train_worker import REFERENCE_VARIANT, TrainBenchPlan, TrainBenchResult, run_rank
from workflows.bench.variants import Variant
from workflows.config import presets
from workflows.config.latent_shapes import CHUNKS, default_size, geometry_for_preset
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.training.memory_check import require_training_memory

MAX_SLOWDOWN = 1.05  # of ray_zero1 over bare
MIN_STEP_S = 0.5  # MAX_SLOWDOWN does not apply to shorter steps
MIN_TOKENS = 3000  # per rank
VARIANTS = (REFERENCE_VARIANT, "ray_torch", "ray_zero0", "ray_zero1", "ray_zero2", "ray_zero3")
MUTUAL_VARIANTS = {"dmd5": Variant(dmd=5), "dmd1": Variant(dmd=1), "full_copy": Variant(full_copy=True)}
OTHER_VARIANTS = {"compiled": Variant(compiled=True)}  # of every stage


class TrainBenchRow(TypedDict):
    """Result of ``mfctl bench train``, as printed by ``--json``; mappings are by variant."""

    stage: Stage
    workers: int
    threads: int
    batch: int  # clips per step over all ranks
    tokens: int  # per step and rank
    parameters: int
    rounds: int
    steps_per_turn: int
    step_s: dict[str, float]  # median seconds per step
    step_s_spread: dict[str, list[float]]  # least and most
    overhead: dict[str, float]  # step time over that of the reference loop
    overhead_spread: dict[str, list[float]]
    overhead_cpu: dict[str, float]
    overhead_zero1: float | None
    bar: float | None  # largest accepted overhead_zero1; None: steps are too short
    data_wait_share: float
    data_wait_share_by_variant: dict[str, float]
    tokens_per_s: dict[str, float]
    flops: int  # per step and rank
    matmul_flops_per_s: float
    forward_over_products: float
    block_over_products: float
    limit_s: float  # seconds per step at the rate of large matrix products
    mfu: float
    mfu_by_variant: dict[str, float]
    model_state_bytes: dict[str, int]
    peak_memory_bytes: int
    loss_gap: dict[str, float]
    not_measured: dict[str, str]
    profiles: dict[str, str]


def bench_train(
    *,
    stage: Stage = "joint",
    preset: str = "tiny",
    size: tuple[int, int] | None = None,
    workers: int = 1,
    tokens: int = MIN_TOKENS,
    rounds: int = 5,
    turn: int = 3,
    variants: Sequence[str] = VARIANTS,
    profile: bool = False,
    sets: Sequence[str] = (),
) -> TrainBenchRow:
    """Return step times of all variants, their ratios to the reference loop, and the limit.

    ``size``: height, width in pixels. ``tokens``: minimum per rank and step. ``turn``: steps of a variant per round.
    ``profile`` adds operator tables of the reference loop and the last variant. Raises ValueError for invalid options.
    """
    if rounds < 1 or turn < 1:
        raise UserInputError(f"--rounds and --turn must be at least 1, got {rounds} and {turn}")
    config = bench_config(stage=stage, preset=preset, workers=workers, tokens=tokens, sets=sets, size=size)
    require_training_memory(config, "cuda" if config.engine.use_gpu else "cpu")
    chosen, missing = available_variants(config, variants)
    if config.engine.compile or "compiled" in chosen:
        check_compiler(torch.device("cuda" if config.engine.use_gpu else "cpu"))
    plan = TrainBenchPlan(
        config=config,
        variants=chosen,
        rounds=rounds,
        turn=turn,
        threads=int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers)),
        profiled=tuple(dict.fromkeys((REFERENCE_VARIANT, list(chosen)[-1]))) if profile else (),
    )
    on_ray = any(name.startswith("ray_") for name in chosen)
    return summarize(plan, run_on_ranks(run_rank, plan, config.engine, on_ray=on_ray), missing)


def bench_config(
    *,
    stage: Stage,
    preset: str,
    workers: int,
    tokens: int,
    sets: Sequence[str],
    size: tuple[int, int] | None = None,
    chunks: int | None = None,
) -> RunConfig:
    """Return the preset with equal steps: one clip length, last phase of the mutual stage.

    ``chunks``: clip length; None: the longest of the preset.
    """
    if workers < 1 or tokens < 1:
        raise UserInputError(f"--workers and --tokens must be at least 1, got {workers} and {tokens}")
    config = presets.build_preset(preset, stage, geometry_for_preset(preset).shapes(size or default_size(preset)))
    if isinstance(config.objective, MutualConfig):
        whole = replace(config.objective, real_until=0, free_from=0, fake_from=0, dmd_from=0, dmd_ramp=1)
        config = replace(config, objective=whole)
    length, rows = chunks or config.data.chunks[1], config.data.batch * workers
    data = replace(config.data, chunks=(length, length), batch=rows)
    config = replace(config, data=data, engine=replace(config.engine, workers=workers, use_gpu=_gpu()))
    if sets:
        from workflows.config import serialization  # pydantic: not needed by `mfctl bench gpu`

        config = serialization.apply_overrides(config, serialization.parse_overrides(sets))
    if config.data.chunks[1] > CHUNKS:
        raise UserInputError(
            f"the clips of the bench hold {CHUNKS} chunks, got data.chunks={config.data.chunks}. Lower data.chunks"
        )
    return replace(
        config, data=replace(config.data, batch=config.data_parallel_size * clips_for_tokens(config, tokens))
    )


def clips_for_tokens(config: RunConfig, tokens: int) -> int:
    """Return the clips per rank with at least ``tokens``, in whole row cycles and micro-batches."""
    timeline = synthetic_data.synthetic_collator(config.model).timeline
    chunks = config.data.chunks[1]
    per_clip = sum(timeline.count(m, chunks) * branch.tokens for m, branch in config.model.branches.items())
    unit = max(config.rows_per_cycle, config.data.micro or 1)
    return unit * ceil(tokens / (per_clip * unit))


def _gpu() -> bool:
    return torch.cuda.is_available()


def available_variants(config: RunConfig, names: Sequence[str]) -> tuple[dict[str, Variant], dict[str, str]]:
    """Return the variants this machine can run, reference loop first, and the missing ones."""
    others = OTHER_VARIANTS | (MUTUAL_VARIANTS if config.stage == "mutual" else {})
    known = (*VARIANTS, *others)
    if odd := [name for name in names if name not in known]:
        raise UserInputError(f"unknown variant {odd[0]!r} of stage {config.stage}: choose from {', '.join(known)}")
    chosen, missing = {REFERENCE_VARIANT: Variant()}, dict[str, str]()
    for name in (name for name in known if name in names and name != REFERENCE_VARIANT):
        if name in others:
            chosen[name] = others[name]
            continue
        kind = name.removeprefix("ray_")
        needs = [n for n in ("ray", *(["deepspeed"] if kind != "torch" else [])) if not _installed(n)]
        if needs:
            missing[name] = f"not measured: needs {' and '.join(needs)}"
        if kind == "torch":
            chosen[kind if needs else name] = Variant(engine=replace(config.engine, kind="torch"))
        elif not needs:
            stage = cast(Literal[0, 1, 2, 3], int(kind.removeprefix("zero")))
            chosen[name] = Variant(engine=replace(config.engine, kind="deepspeed", zero_stage=stage))
    return chosen, missing


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def summarize(plan: TrainBenchPlan, measured: TrainBenchResult, missing: Mapping[str, str]) -> TrainBenchRow:
    """Return what ``--json`` prints: medians over the rounds, in seconds per step."""
    config, world = plan.config, plan.config.engine.max_workers
    step_s = {name: median(t.step_s for t in turns) for name, turns in measured.turns.items()}
    overhead = {name: _over_bare(measured, name, "step_s") for name in step_s if name != REFERENCE_VARIANT}
    wait = {name: median(t.wait_s / t.step_s for t in turns) for name, turns in measured.turns.items()}
    limit_s = measured.flops / median(measured.flops_per_s)
    main = next(name for name in ("ray_zero1", "ray_torch", "torch", REFERENCE_VARIANT) if name in step_s)
    return {
        "stage": config.stage,
        "workers": world,
        "threads": measured.threads,
        "batch": config.data.batch,
        "tokens": measured.tokens,
        "parameters": measured.parameters,
        "rounds": plan.rounds,
        "steps_per_turn": plan.turn,
        "step_s": step_s,
        "step_s_spread": {name: _spread([t.step_s for t in turns]) for name, turns in measured.turns.items()},
        "overhead": {name: median(ratios) for name, ratios in overhead.items()},
        "overhead_spread": {name: _spread(ratios) for name, ratios in overhead.items()},
        "overhead_cpu": {name: median(_over_bare(measured, name, "cpu_s")) for name in overhead},
        "overhead_zero1": median(overhead["ray_zero1"]) if "ray_zero1" in overhead else None,
        "bar": MAX_SLOWDOWN if step_s[REFERENCE_VARIANT] >= MIN_STEP_S and measured.tokens >= MIN_TOKENS else None,
        "data_wait_share": wait[main],
        "data_wait_share_by_variant": wait,
        "tokens_per_s": {name: config.data_parallel_size * measured.tokens / s for name, s in step_s.items()},
        "flops": measured.flops,
        "matmul_flops_per_s": median(measured.flops_per_s),
        "forward_over_products": measured.over_products.forward,
        "block_over_products": measured.over_products.block,
        "limit_s": limit_s,
        "mfu": limit_s / step_s[main],
        "mfu_by_variant": {name: limit_s / s for name, s in step_s.items()},
        "model_state_bytes": measured.state_bytes,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "loss_gap": {name: _gap(measured, name) for name in overhead if name not in MUTUAL_VARIANTS},
        "not_measured": dict(missing),
        "profiles": measured.profiles,
    }


def _spread(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def _over_bare(measured: TrainBenchResult, name: str, what: Literal["step_s", "cpu_s"]) -> list[float]:
    """Return the ratio to the reference loop of the same round, for each round."""
    pairs = zip(measured.turns[name], measured.turns[REFERENCE_VARIANT], strict=True)
    return [getattr(own, what) / getattr(bare, what) for own, bare in pairs]


def _gap(measured: TrainBenchResult, name: str) -> float:
    """Return the largest relative loss difference from the reference loop, to verify equal work."""
    pairs = zip(measured.turns[name], measured.turns[REFERENCE_VARIANT], strict=True)
    return max(abs(own.loss - bare.loss) / abs(bare.loss) for own, bare in pairs)


def format_table(result: TrainBenchRow) -> str:
    """Format the result as a text table."""
    lines = [
        f"stage {result['stage']}: {result['parameters'] / 1e6:.1f}M parameters, {result['workers']} worker(s) with "
        f"{result['threads']} thread(s), {result['batch']} clips, {result['tokens']} tokens per rank and step",
        f"{'':10} {'s/step':>8} {'(min..max)':>15} {'/ bare':>7} {'(min..max)':>11} {'CPU / bare':>10} {'tokens/s':>9} "
        f"{'data':>6} {'of limit':>8} {'state MB':>9}",
        *(_row(result, name) for name in result["step_s"]),
        *(f"{name:10} {why}" for name, why in result["not_measured"].items()),
        f"{'limit':10} {result['limit_s']:8.3f}: {result['flops'] / 1e9:.1f} GFLOP per step and rank at "
        f"{result['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s of large matrix products",
        f"time over matrix products alone: block {result['block_over_products']:.2f}, "
        f"forward pass {result['forward_over_products']:.2f}",
        f"largest relative loss difference from the reference loop {max(result['loss_gap'].values(), default=0):.0e}; "
        f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB per rank, all variants together",
        *(f"\nprofile of {name}\n{table}" for name, table in result["profiles"].items()),
    ]
    return "\n".join(lines)


def _row(result: TrainBenchRow, name: str) -> str:
    low, high = result["step_s_spread"][name]
    least, most = result["overhead_spread"].get(name, (1.0, 1.0))
    return (
        f"{name:10} {result['step_s'][name]:8.3f} {f'{low:.3f}..{high:.3f}':>15} "
        f"{result['overhead'].get(name, 1.0):7.3f} {f'{least:.2f}..{most:.2f}':>11} "
        f"{result['overhead_cpu'].get(name, 1.0):10.3f} {result['tokens_per_s'][name]:9.0f} "
        f"{result['data_wait_share_by_variant'][name]:6.1%} {result['mfu_by_variant'][name]:8.1%} "
        f"{result['model_state_bytes'][name] / 1e6:9.1f}"
    )
