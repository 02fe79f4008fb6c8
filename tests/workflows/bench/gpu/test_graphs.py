"""Build the graphs of the parts of `mfctl bench gpu` on a fake CUDA device: no mixed devices, no synchronization."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.model.transformer import build_model
from tests.helpers.fake_cuda import DEVICE, HostSynchronizationError, fake_cuda
from workflows.bench.gpu import training
from workflows.bench.gpu.small_model import small_batch, small_network, small_stream
from workflows.bench.gpu.training import TrainCase, case_config
from workflows.bench.random_network import random_network
from workflows.bench.stream import plan_stream_bench
from workflows.bench.stream_runner import StreamRunner, noise_condition
from workflows.bench.variants import synthetic_batches
from workflows.study.config import study_preset
from workflows.study.methods import GROUPS
from workflows.study.step_times import JOINT, build_trainer
from workflows.training.loop import TrainingLoop

LAYERS = 1
BF16 = torch.bfloat16


@pytest.fixture
def cuda():
    with fake_cuda() as mode, mock.patch("workflows.utils.distributed.local_device", return_value=DEVICE):
        yield mode


def streamer(preset, *, size, rows=1, model=lambda net: net, layers=LAYERS):
    """Return a stream of the preset with few layers on the fake device."""
    plan = plan_stream_bench(
        preset=preset, size=size, steps=1, chunks=40, rounds=1, device="cpu", precision="bf16", sets=()
    )
    config = replace(plan.model, layers=layers)
    net = random_network(config, DEVICE, BF16)
    cond = noise_condition(config, plan.timeline, DEVICE, rows=rows)
    return StreamRunner(net, cond, plan.timeline, steps=1, model=model(net))


@torch.no_grad()
def test_the_device_reports_mixed_devices_and_reads(cuda):
    here = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device|different devices"):
        here + torch.ones(3)
    with pytest.raises(HostSynchronizationError, match="reads a value"):
        bool((here > 0).all())
    with pytest.raises(HostSynchronizationError, match="copies"):
        here.cpu()
    here.copy_(torch.zeros(3))
    torch.zeros(3).to(DEVICE, non_blocking=True)
    assert len(cuda.host_copies) == 2 and len(cuda.blocking_copies) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "size", "rows"), [("full", (704, 1280), 1), ("base", (192, 336), 2)])
@torch.no_grad()
def test_a_stream_neither_mixes_devices_nor_synchronizes(cuda, preset, size, rows):
    with torch.autocast("cuda", BF16):
        stream = streamer(preset, size=size, rows=rows)
        stream.time_chunks(1)
        cuda.blocking_copies.clear()
        stream.time_chunks(1)
    assert cuda.blocking_copies == []
    assert all(s.latents.device == DEVICE for s in stream.chunk.values())


@pytest.mark.slow
@torch.no_grad()
def test_a_captured_pass_copies_nothing_from_the_cpu(cuda):
    captured = []

    def capture(work):
        before = len(cuda.host_copies)
        out = work()
        assert cuda.host_copies[before:] == []
        captured.append(work)
        return out, work

    with torch.autocast("cuda", BF16):
        streamer("full", size=(192, 336), model=lambda net: CUDAGraphModel(net, capture)).time_chunks(2)
    assert captured


def train_step(case, layers=LAYERS):
    """Run one step of a training case on the fake device."""
    config = case_config(case, tokens=1)
    config = replace(config, model=replace(config.model, layers=layers, attention="sdpa"))
    student = random_network(config.model, DEVICE, torch.float32).requires_grad_(True).train()
    batch = [micro.to(DEVICE) for micro in synthetic_batches(config).micro_batches(0)]
    return training.build_step(case, config, student, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [TrainCase(preset="base", chunks=2), TrainCase(preset="base", stage="mutual", chunks=2)],
    ids=lambda case: case.name,
)
def test_a_training_step_neither_mixes_devices_nor_synchronizes(cuda, case):
    step = train_step(case)
    step(0)
    cuda.blocking_copies.clear()
    cuda.cpu_masks = 0
    step(1)
    assert cuda.blocking_copies == []
    assert cuda.cpu_masks <= 14  # masks over chunks of the batch


@pytest.mark.slow
@pytest.mark.parametrize("case", training.train_cases(None), ids=lambda case: case.name)
def test_every_training_case_runs_on_the_device(cuda, case, monkeypatch):
    monkeypatch.setattr("workflows.utils.distributed.all_reduce_any", lambda flags: [False] * len(flags))
    monkeypatch.setattr(TrainingLoop, "_report", lambda self, progress, result: progress)
    cuda.may_read = case.engine  # flags of non-finite numbers, and the gradient norm
    train_step(replace(case, compile=False, chunks=2))(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [JOINT, *GROUPS["core"]])
def test_a_step_of_the_study_reads_flags_and_gradient_norms_only(cuda, name):
    cuda.may_read = True
    config = replace(study_preset("quick"), batch=4, joint_batch=4, chunks=(3,), joint_chunks=(3,))
    config = replace(config, model=replace(config.model, layers=LAYERS))
    trainer = build_trainer(config, name, build_model(config.model, 0).to(DEVICE))
    trainer.step = config.steps - 1
    trainer.train_step(with_metrics=False)
    assert cuda.reads <= 8


@pytest.mark.slow
@torch.no_grad()
def test_the_small_network_of_the_parity_checks_runs_on_the_device(cuda):
    made = small_stream(small_network(DEVICE), small_batch(DEVICE, chunks=1), chunks=2)
    assert all(s.latents.device == DEVICE for s in made.values())
