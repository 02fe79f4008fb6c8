"""Training steps on one GPU: MFU of the joint stage, and the mutual step against joint training and against DMD."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from mfcore.model.compile import check_compiler
from mfcore.model.flops import count_parameters, training_state_bytes
from mfcore.model.transformer import AVTransformer
from mfcore.objectives.losses import LossTerm, StepInfo, total_loss
from mfcore.types import AVBatch
from workflows.bench import roofline
from workflows.bench.gpu.memory import require_device_memory
from workflows.bench.random_network import random_network
from workflows.bench.reference_loop import dmd_loop, reference_loop
from workflows.bench.train import bench_config, clips_for_tokens
from workflows.bench.variants import EngineRunner, synthetic_batches, to_device
from workflows.config.run import RunConfig
from workflows.config.stage_names import Stage
from workflows.training.loop import count_tokens
from workflows.training.objectives import build_objective
from workflows.utils.case_worker import BenchCase, WorkerOptions
from workflows.utils.timing import time_call

TOKENS = 15_000  # per step, at least
SHORT_CLIP = 6  # chunks, for comparisons of the mutual step
WARM_UPS = 2
STEPS = 8  # timed steps
FAKE_SCORE_BYTES = 16  # per weight: float32 weight, gradient and moments of a full copy
TEACHER_BYTES = 4
COMPILE = "compiled blocks take minutes without a GPU"


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """One setting to measure."""

    preset: str
    stage: Stage = "joint"
    recompute: bool = True
    compile: bool = False
    engine: bool = False  # the training loop with TorchEngine instead of the reference loop
    dmd: int | None = None  # DMD with a separate teacher: fake-score updates per step
    chunks: int | None = None  # clip length; None: the longest of the preset
    least_seconds: float = 8.0

    @property
    def name(self) -> str:
        """Return the unique name, e.g. ``base joint compile``."""
        kind = f"dmd{self.dmd}" if self.dmd else self.stage
        switches = [("engine", self.engine), ("compile", self.compile), ("stored", not self.recompute)]
        words = [self.preset, kind, *(word for word, on in switches if on)]
        return " ".join([*words, *([f"{self.chunks} chunks"] if self.chunks else [])])


def train_cases(preset: str | None) -> list[TrainCase]:
    """Return all settings by value; with ``preset`` those of one network."""
    if preset:
        one = partial(TrainCase, preset=preset, least_seconds=0.0)
        return [
            *(one(), one(recompute=False), one(engine=True), one(compile=True)),
            *(one(stage="mutual", chunks=2), one(stage="mutual", chunks=2, dmd=1)),
        ]
    base = partial(TrainCase, preset="base")
    short = {preset: partial(TrainCase, preset=preset, chunks=SHORT_CLIP) for preset in ("base", "small")}
    return [
        base(least_seconds=15.0),
        base(compile=True, least_seconds=40.0),
        *(short["small"](), short["small"](stage="mutual")),
        *(short["small"](stage="mutual", dmd=updates) for updates in (1, 5)),
        base(recompute=False),
        *(short["base"](least_seconds=10.0), short["base"](stage="mutual", least_seconds=25.0)),
        base(engine=True),
        short["base"](stage="mutual", dmd=1, least_seconds=25.0),
        base(recompute=False, compile=True, least_seconds=40.0),
    ]


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield the cases of the part."""
    for case in train_cases(options.preset):
        yield BenchCase(
            name=case.name,
            run=partial(measure, case, options),
            least_seconds=0.0 if options.rehearsal else case.least_seconds,
            needs_cuda=COMPILE if case.compile else "",
        )


def measure(case: TrainCase, options: WorkerOptions) -> dict[str, Any]:
    """Return the numbers of one setting."""
    device = options.device
    config = case_config(case, tokens=1 if options.rehearsal else TOKENS)
    require_device_memory(device, state_bytes(case, config))
    if case.compile:
        check_compiler(device)
    student = random_network(config.model, device, torch.float32).requires_grad_(True).train()
    batch = to_device(synthetic_batches(config).micro_batches(0))
    flops = joint_flops(config, student, batch) if case.stage == "joint" else None
    step = build_step(case, config, student, batch)
    times, terms = time_steps(options, step)
    dtype = config.engine.autocast or torch.float32
    return summarize(config, batch, times, flops=flops, rate=roofline.matmul_flops_per_s(device, dtype)) | {
        "loss": loss_of(terms),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


def case_config(case: TrainCase, *, tokens: int) -> RunConfig:
    """Return the configuration of one setting."""
    config = bench_config(stage=case.stage, preset=case.preset, workers=1, tokens=tokens, sets=(), chunks=case.chunks)
    config = replace(config, data=replace(config.data, micro=None))  # stored activations of more clips do not fit
    config = replace(config, data=replace(config.data, batch=clips_for_tokens(config, tokens)))
    engine = replace(config.engine, kind="torch", recompute=case.recompute, compile=case.compile)
    return replace(config, engine=engine)


def state_bytes(case: TrainCase, config: RunConfig) -> int:
    """Return the bytes of weights, gradients, moments and averages; activations are not counted."""
    weights = count_parameters(config.model)["total"]
    own = training_state_bytes(weights, 1, 0)
    return own + (FAKE_SCORE_BYTES + TEACHER_BYTES) * weights if case.dmd else own


def build_step(
    case: TrainCase, config: RunConfig, student: AVTransformer, batch: list[AVBatch]
) -> Callable[[int], list[LossTerm]]:
    """Return a function that runs one optimizer step by its number; it returns the terms of the reference loop."""
    if case.engine:
        runner = EngineRunner(config, config.engine, student)

        def run(step: int) -> list[LossTerm]:
            del step
            runner.run([batch], 1)
            return []

        return run
    loop = dmd_loop(config, case.dmd, student) if case.dmd else reference_loop(config, student)
    return lambda step: loop.run([batch], step, step + 1)


def time_steps(options: WorkerOptions, step: Callable[[int], list[LossTerm]]) -> tuple[list[float], list[LossTerm]]:
    """Return the seconds of the steps after a warm-up, and the terms of the last one."""
    warm_ups, wanted = (1, 1) if options.rehearsal else (WARM_UPS, STEPS)
    terms: list[LossTerm] = []
    for number in range(warm_ups):
        terms = step(number)
    half = time.monotonic() + max(4.0, 0.5 * options.seconds_left)
    times: list[float] = []
    while len(times) < wanted and (len(times) < 2 or time.monotonic() < half):
        seconds, terms = time_call(options.device, step, warm_ups + len(times))
        times.append(seconds)
    return times, terms


@torch.no_grad()
def joint_flops(config: RunConfig, student: AVTransformer, batch: list[AVBatch]) -> int:
    """Return the FLOPs of a step of the joint stage without recomputation: three times the forward pass.

    Attention counts visible entries only, with a dense mask, as ``roofline.count_flops``.
    """
    objective, model = build_objective(config), student.config
    student.config = replace(model, attention="sdpa")
    micro = batch[0]
    device = micro.cond.caption.device.type
    dtype = config.engine.autocast
    try:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            forward = roofline.count_flops(
                lambda: next(objective.rounds({"student": student}, micro, StepInfo(seed=0, step=0, stage_step=0)))
            )
    finally:
        student.config = model
    return 3 * forward * sum(len(b.samples) for b in batch) // len(micro.samples)


def loss_of(terms: list[LossTerm]) -> float | None:
    """Return the loss of a step; None without terms. Raises AssertionError if it is not finite."""
    if not terms:
        return None
    loss = float(total_loss(terms).detach())
    assert abs(loss) < float("inf"), f"the loss is {loss}"
    return loss


def summarize(
    config: RunConfig, batch: list[AVBatch], times: list[float], *, flops: int | None, rate: float
) -> dict[str, Any]:
    """Return the numbers of one setting. ``rate``: FLOPs per second of large products."""
    step_s, tokens = median(times), sum(count_tokens(config, micro) for micro in batch)
    found: dict[str, Any] = {
        "step_s": step_s,
        "least_s": min(times),
        "most_s": max(times),
        "steps": len(times),
        "clips": sum(len(micro.samples) for micro in batch),
        "tokens": tokens,
        "tokens_per_s": tokens / step_s,
        "matmul_flops_per_s": rate,
    }
    if flops is not None:
        found |= {"tflop": flops / 1e12, "floor_s": flops / rate, "mfu": flops / rate / step_s}
    return found
