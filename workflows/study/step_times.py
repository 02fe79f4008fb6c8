"""Time per step of the core rows of the study, and the time of a whole seed: ``python -m workflows.study.step_times``.

A part of ``mfctl bench gpu``. Networks have random weights, so nothing has to be trained before.
"""

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from mfcore.model.transformer import build_model
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from workflows.study.config import StudyConfig, study_preset
from workflows.study.methods import GROUPS, METHODS
from workflows.study.trainer import Trainer
from workflows.utils import case_worker
from workflows.utils.case_worker import BenchCase, WorkerOptions
from workflows.utils.timing import time_call

JOINT = "joint"
WARM_UPS = 2
STEPS = 12
CASE_SECONDS = 4.0  # at most, apart from the first steps
SEEDS = 3  # of the published study


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield one case per row: joint training and each core method."""
    config = study_preset("toy-study")
    if options.rehearsal:
        config = replace(study_preset("quick"), batch=4, joint_batch=4, chunks=(3,), joint_chunks=(3,))
    for name in (JOINT, *GROUPS["core"]):
        yield BenchCase(name=name, run=partial(time_row, config, options, name))


def time_row(config: StudyConfig, options: WorkerOptions, name: str) -> dict[str, Any]:
    """Return the seconds per step in the first and in the last phase of one row, and of its whole training."""
    student = build_model(config.model, 0).to(options.device)
    steps = config.joint_steps if name == JOINT else config.steps
    trainer = build_trainer(config, name, student)
    first = time_steps(trainer, options, 0)
    if name == JOINT:
        return {"step_s": first, "training_s": steps * first, f"training_s_of_{SEEDS}_seeds": SEEDS * steps * first}
    last_phase = config.method.dmd_from + config.method.dmd_ramp
    last = time_steps(trainer, options, last_phase)
    training = config.method.free_from * first + (steps - config.method.free_from) * last
    return {
        "step_s": last,
        "first_phase_step_s": first,
        "training_s": training,
        f"training_s_of_{SEEDS}_seeds": SEEDS * training,
    }


def build_trainer(config: StudyConfig, name: str, student: nn.Module) -> Trainer:
    """Return the trainer of one row with ``student`` as the network before its first step."""
    if name == JOINT:
        objective = FlowMatchingObjective(FlowMatchingConfig(time=config.method.time))
        config = replace(config, batch=config.joint_batch, chunks=config.joint_chunks)
        return Trainer(config, objective, student, seed=0, steps=config.joint_steps, optim=config.joint_optim)
    method = METHODS[name]
    config = method.change(config)
    frozen = copy.deepcopy(student).eval().requires_grad_(False) if method.teacher == "frozen" else None
    return Trainer(
        config,
        method.objective(config.method),
        student,
        seed=0,
        steps=config.steps,
        optim=config.optim,
        teacher=frozen,
    )


def time_steps(trainer: Trainer, options: WorkerOptions, first: int) -> float:
    """Return the median seconds of the steps from number ``first`` on."""
    trainer.step = first
    warm_ups, wanted = (1, 1) if options.rehearsal else (WARM_UPS, STEPS)
    step = partial(trainer.train_step, with_metrics=False)
    for _ in range(warm_ups):
        step()
    end = time.monotonic() + CASE_SECONDS
    times: list[float] = []
    while len(times) < wanted and (len(times) < 2 or time.monotonic() < end):
        times.append(time_call(torch.device(options.device), step)[0])
    return median(times)


if __name__ == "__main__":
    sys.exit(case_worker.main(cases))
