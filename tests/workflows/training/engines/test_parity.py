"""All engines give the same numbers for every stage, for any split of a batch."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.objectives.losses import StepInfo, total_loss
from mfcore.optim import OptimConfig
from tests.helpers.gloo_processes import run_on
from tests.helpers.linear_network import FlowOnly, LinearVelocity, toy_batch
from tests.helpers.two_rank_training import OBJECTIVE, RunSpec, RunTrainer, difference, train
from workflows.config.run import EngineConfig
from workflows.training.engines.base import Engine, build_engine
from workflows.utils import distributed

TORCH = EngineConfig(kind="torch")
KINDS = {"torch": TORCH} | {
    f"zero{stage}{'_offload' if offload else ''}": EngineConfig(zero_stage=stage, offload_optimizer=offload)
    for offload in (False, True)
    for stage in (0, 1, 2, 3)
    if stage or not offload
}
RANK = 4  # of the fake score's terms
STAGES = [("video", None), ("audio", None), ("joint", None), ("mutual", None), ("mutual", RANK)]


def engine(name: str, **changes: object) -> EngineConfig:
    return replace(KINDS[name], **changes)


def losses(numbers: torch.Tensor) -> torch.Tensor:
    """Return the losses without gradient norms: engines differ by an epsilon of 1e-6 in clipping."""
    return numbers[:, : numbers.shape[1] // 2]


# Ordinary: two steps (the second sees what the first has changed), all that two processes are asked for in one start.

FEW = 2
SMALL = 1e-5
VIDEO = RunSpec(stage="video", engine=TORCH)
MUTUAL = RunSpec(
    stage="mutual", engine=TORCH, rank=RANK, objective=replace(OBJECTIVE, rollout_steps=(4,), fake_updates=2)
)
RUNS = {
    "torch": MUTUAL,
    "zero1": replace(MUTUAL, engine=engine("zero1")),
    "zero3": replace(MUTUAL, engine=engine("zero3", recompute=True)),
    "video_zero2_offload": replace(VIDEO, engine=engine("zero2_offload", recompute=True)),
}


@dataclass
class Two:
    """Results of two processes."""

    losses: dict[str, torch.Tensor]
    moved: torch.Tensor  # the second step of a plain run that resumes after the first step of another engine
    small_steps: dict[str, dict[str, float]]  # relative change of weights, moments and average in one bf16 step
    linear: tuple[torch.Tensor, torch.Tensor]  # what a layer gives and its gradient, after training at ZeRO-3


RESUMED = "zero3"


def few_on_two(folder: str) -> Two:
    numbers = {name: train(spec, FEW) for name, spec in RUNS.items() if name != RESUMED}
    numbers[RESUMED], moved = resume_with(RUNS[RESUMED], MUTUAL, Path(folder))
    return Two(
        losses=numbers,
        moved=moved,
        small_steps={kind: one_small_step(engine(kind, precision="bf16")) for kind in KINDS},
        linear=rounded(torch.nn.functional.linear),  # no longer torch's
    )


def rounded(linear: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw) for shape in ((2, 3, 64), (32, 64), (32,)))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    y.float().square().sum().backward()
    assert weight.grad is not None
    return y.detach(), weight.grad


def resume_with(spec: RunSpec, other: RunSpec, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Run two steps, the second one in another run that loads the state of the first."""
    first, then = RunTrainer(spec), RunTrainer(other)
    numbers = [first.step(0)]
    for name, e in first.engines.items():
        e.state_shard().write(folder, name)
    average = {name: value.clone() for name, value in first.ema.weights()}
    numbers.append(first.step(1))
    distributed.barrier()
    for name, e in then.engines.items():
        e.load(folder, name)
    then.ema.load_state_dict(average)
    return torch.tensor(numbers, dtype=torch.float64), torch.tensor([then.step(1)], dtype=torch.float64)


def one_small_step(config: EngineConfig) -> dict[str, float]:
    """Return the smallest relative change of a weight (Adam's first step is the learning rate) and of its EMA."""
    net = LinearVelocity()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    ema = Ema(net, EmaConfig(decay=0.9, warm_up=False))
    engine = build_engine(net, OptimConfig(lr=SMALL, weight_decay=0, warm_up=0), config)
    batch = toy_batch(distributed.get_rank() * 2, 2)
    terms = FlowOnly()({"student": engine.module}, batch, StepInfo(seed=0, step=0, stage_step=0))
    engine.backward(total_loss(terms["student"]))
    engine.step(SMALL)
    ema.update(engine.weights(), 0)
    weights = {name: w.clone() for name, w in engine.weights() if name != "unused"}
    assert all(w.dtype == torch.float32 for w in weights.values())
    return {
        "weight": min(float((w - 1).abs().min()) for w in weights.values()),
        "average": min(float((w - 1).abs().min()) for n, w in ema.weights() if n != "unused"),
        # of every weight: float32 numbers that bfloat16 could not hold
        "moment": max(float((m - m.bfloat16()).abs().max() / m.abs().max()) for m in moments(engine)),
    }


def moments(engine: Engine) -> list[torch.Tensor]:
    held = engine.state_shard().tensors.items()
    return [m for name, m in held if name.startswith("exp_avg/") and "unused" not in name]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Two:
    return run_on(2, few_on_two, str(tmp_path_factory.mktemp("state")))[0]


@pytest.fixture(scope="module")
def on_one() -> dict[str, torch.Tensor]:
    return {"mutual": train(MUTUAL, FEW), "video": train(VIDEO, FEW)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_every_engine_on_two_processes_equals_one_plain_process(on_one, on_two, name):
    expected = on_one[RUNS[name].stage]
    assert difference(losses(on_two.losses[name]), losses(expected)) < 1e-5
    assert difference(on_two.losses[name], expected) < 1e-4


@pytest.mark.slow
def test_a_low_rank_run_resumes_under_another_engine(on_one, on_two):
    assert difference(losses(on_two.moved), losses(on_one["mutual"][1:])) < 1e-5


def test_a_layer_rounds_once_at_zero3(on_two):
    for after, plain in zip(on_two.linear, rounded(torch.nn.functional.linear), strict=True):
        assert after.dtype == plain.dtype
        assert torch.equal(after, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_small_steps_are_kept_under_bf16(on_two, kind):
    """bfloat16 numbers near 1 are 0.004 apart: relative changes of 1e-5 and less would be lost."""
    found = on_two.small_steps[kind]
    assert found["weight"] == pytest.approx(SMALL, rel=0.02)
    assert found["average"] == pytest.approx(SMALL / 10, rel=0.1)  # of 1: float32 steps there are 6e-8 to 1.2e-7
    assert found["moment"] > 1e-4


@pytest.mark.parametrize("spec", [MUTUAL, replace(MUTUAL, rank=None)], ids=["low_rank", "full_copy"])
def test_accumulated_gradients_are_those_of_the_whole_batch(spec):
    whole, halves = (train(replace(spec, micros=n), FEW) for n in (1, 2))
    assert difference(losses(halves), losses(whole)) < 1e-5


# Slow: the whole matrix, 50 steps. All engines of a stage in one start; ZeRO-3 last, which changes layers for good.

MANY = 50
BFLOAT16 = [("joint", None), ("mutual", RANK)]
Numbers = dict[str, torch.Tensor]  # by kind of engine


def many(stage: str, rank: int | None, precision: str) -> Numbers:
    found: Numbers = {}
    for kind in sorted(KINDS, key=lambda kind: KINDS[kind].zero_stage == 3):
        found[kind] = train(RunSpec(stage=stage, engine=engine(kind, precision=precision), rank=rank), MANY)
        gc.collect()
    return found


@pytest.fixture(scope="module")
def matrix() -> Callable[[str, int | None, str], Numbers]:
    """Return fifty steps of every engine on two processes; each stage is computed once."""
    return cache(lambda stage, rank, precision: run_on(2, many, stage, rank, precision)[0])


@pytest.fixture(scope="module")
def alone() -> Callable[[str, int | None], torch.Tensor]:
    """Return the same steps of one plain process."""

    def fifty(stage: str, rank: int | None) -> torch.Tensor:
        torch.set_num_threads(1)
        return train(RunSpec(stage=stage, engine=TORCH, rank=rank), MANY)

    return cache(fifty)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "rank"), STAGES)
def test_fifty_steps_in_float32(matrix, alone, stage, rank, kind):
    one, two = alone(stage, rank), matrix(stage, rank, "fp32")[kind]
    print(stage, rank, kind, "largest relative difference of a loss:", difference(losses(two), losses(one)))
    assert difference(losses(two), losses(one)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torch"])
@pytest.mark.parametrize(("stage", "rank"), BFLOAT16)
def test_fifty_steps_in_bfloat16(matrix, stage, rank, kind):
    """bfloat16 numbers are 0.004 to 0.008 apart, relatively; float32 weights prevent an accumulation."""
    found = matrix(stage, rank, "bf16")
    one, two = found["torch"], found[kind]
    print(stage, rank, kind, "largest relative difference of a loss:", difference(losses(two), losses(one)))
    assert difference(losses(two), losses(one)) < 0.016
