"""Run the tasks of a study on a pool of processes; load their results."""

import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeGuard

import torch

from mfcore.errors import UserInputError
from workflows.config.serialization import diff, fill_defaults, to_dict
from workflows.study.config import SAMPLING, StudyConfig
from workflows.study.methods import GROUPS, METHODS
from workflows.study.results_table import COLUMNS, StudyRow, TrainingCost
from workflows.study.tasks import (
    JOINT_KEY,
    LOG_FILE,
    REAL_KEY,
    WEIGHTS,
    DeadlineReached,
    StudyTask,
    pending_tasks,
    plan_tasks,
    run_task,
)
from workflows.study.trainer import STEP_FILE
from workflows.utils.json_io import corrupt_file_error, read_json, write_json

POLL_SECONDS = 1.0
MAX_SEEDS = 1000  # number of seeds
MAX_SEED = 1_000_000_000
ROW_COLUMNS = {"method", "mode", "steps", "nfe", "guidance", "seed", "window"}
COST_COLUMNS = {"method", "seed", "steps", "history_use", "state_bytes", "cpu_seconds", "seconds"}


def parse_seeds(text: str) -> list[int]:
    """Parse ``--seeds`` (``3``: 0 to 2; ``3,4``: these). Raises ValueError for other text."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts if part.strip() or len(parts) == 1):
        raise UserInputError(f"--seeds {text}: not a count or a list. Give a count such as 3, or seeds such as 3,4,5")
    which = [int(part) for part in parts if part.strip()]
    most = MAX_SEED if len(parts) > 1 else MAX_SEEDS
    if max(which, default=0) > most:
        raise UserInputError(f"--seeds {text}: too large. Give a count or seeds up to {most}")
    seeds = which if len(parts) > 1 else list(range(which[0]))
    if not seeds:
        raise UserInputError(f"--seeds {text}: no seed. Give at least one")
    return sorted(set(seeds))


def select_methods(names: Sequence[str], seeds: Sequence[int]) -> dict[str, Sequence[int]]:
    """Return the seeds per method: all for core and named methods, else the first.

    Raises ValueError for unknown names.
    """
    wanted: dict[str, Sequence[int]] = {}
    for name in names:
        for method in GROUPS.get(name, (name,)):
            whole = method in GROUPS["core"] or method in names
            wanted[method] = seeds if whole else seeds[:1]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise UserInputError(f"unknown method {', '.join(unknown)}: choose from {', '.join([*GROUPS, *METHODS])}")
    return wanted


def claim_study_dir(config: StudyConfig, out: Path) -> None:
    """Create the folder of a study. Raises ValueError if it holds other settings or other files."""
    path = out / "study.json"
    if path.exists():
        differences = _differences(path, config)
        if differences:
            raise UserInputError(
                f"{out} holds a study with other settings ({'; '.join(differences)}): choose a new folder with --out"
            )
        return
    if out.exists() and not out.is_dir():
        raise UserInputError(f"{out} is a file. --out must name a folder")
    if out.exists() and any(out.iterdir()):
        raise UserInputError(f"{out} is not empty and holds no study: choose a new folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(config))
    except OSError as error:
        raise UserInputError(
            f"cannot write a study to {out}: {error.strerror}. Choose another folder with --out"
        ) from None


def _differences(path: Path, config: StudyConfig, *, ignore: Collection[str] = ()) -> list[str]:
    """Return the differences between a stored configuration and ``config``, as ``a.b: 1 -> 2``."""
    wanted = to_dict(config)
    try:
        stored = read_json(path)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserInputError(f"{path} is not the configuration of a study: choose a new folder with --out")
    stored = fill_defaults(StudyConfig, stored)
    for settings in (stored, wanted):
        for key in ignore:
            settings.pop(key, None)
    return diff(stored, wanted)


def import_networks(config: StudyConfig, source: Path, out: Path, methods: dict[str, Sequence[int]]) -> int:
    """Copy missing trained networks from another study; return their number.

    Raises ValueError if ``config`` differs in settings of the training; settings of sampling may differ.
    """
    path = source / "study.json"
    if not path.exists():
        raise UserInputError(f"{source} holds no study. --networks must name the folder of a study")
    differences = _differences(path, config, ignore=SAMPLING)
    if differences:
        raise UserInputError(
            f"the networks in {source} were trained with other settings ({'; '.join(differences)}). "
            f"Give the same settings with --set; only {', '.join(SAMPLING)} may differ"
        )
    claim_study_dir(config, out)
    copied = 0
    for task in plan_tasks(config, methods):
        if task.kind != "train":
            continue
        record, folder = task.result_path(source), task.result_path(out).parent
        if (folder / record.name).exists() or not record.exists() or not (record.parent / WEIGHTS).exists():
            continue
        if (folder / STEP_FILE).exists():  # this study has begun the training
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, LOG_FILE, record.name):  # the record last: it marks the training as done
            if (record.parent / name).exists():
                shutil.copy(record.parent / name, folder / name)
        copied += 1
    return copied


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """State of a study after a call."""

    done: bool  # False: stopped at the deadline; the same call continues
    failed: dict[str, str] = field(default_factory=dict)  # error by task name


def run_tasks(
    config: StudyConfig,
    out: Path,
    methods: dict[str, Sequence[int]],
    *,
    workers: int,
    device: str,
    minutes: float | None,
    log: Callable[[str], object] = print,
) -> StudyOutcome:
    """Run the pending tasks. If a task fails, only the tasks that depend on it are skipped."""
    claim_study_dir(config, out)
    deadline = float("inf") if minutes is None else time.time() + 60 * minutes
    pending = pending_tasks(out, plan_tasks(config, methods))
    total = len(pending)
    failed: dict[str, str] = {}
    if not pending:
        return StudyOutcome(done=True)
    with worker_pool(workers) as pool:
        running: dict[Future[None], StudyTask] = {}
        while pending or running:
            for task in list(_ready(pending, out)):
                if len(running) >= workers or time.time() > deadline:
                    break
                pending.remove(task)
                future = pool.submit(run_task, config, out, task, device=device, deadline=deadline)
                running[future] = task
            if not running:
                return StudyOutcome(done=False, failed=failed)
            done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    future.result()
                except DeadlineReached as stop:
                    log(str(stop))
                    pending.append(task)
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    if not isinstance(error, ValueError):  # a bug, not a user error
                        traceback.print_exception(error)
                    failed[task.name] = f"{type(error).__name__}: {error}"
                    skipped = _dependents(task, pending)
                    pending = [other for other in pending if other not in skipped]
                    log(f"{task.name} failed: {failed[task.name]}. Skipped {len(skipped)} dependent tasks")
                else:
                    log(f"{total - len(pending) - len(running) - len(failed)} of {total}: {task.name}")
    return StudyOutcome(done=True, failed=failed)


def _dependents(task: StudyTask, among: Sequence[StudyTask]) -> list[StudyTask]:
    """Return the direct and indirect dependents of ``task``."""
    found: list[StudyTask] = []
    for other in among:  # dependencies precede their dependents
        if other.dependency == task or other.dependency in found:
            found.append(other)
    return found


def _ready(pending: Sequence[StudyTask], out: Path) -> Iterator[StudyTask]:
    yield from (task for task in pending if task.is_ready(out))


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that exit with this process."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(workers,))


def _init_worker(workers: int) -> None:
    """Limit the threads of a pool process and make it exit with its parent."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # saved files are complete, so the same command continues


def load_scores(out: Path) -> list[StudyRow]:
    """Return all stored scores. Raises ValueError for a corrupt file."""
    rows: list[StudyRow] = []
    for path in sorted((out / "rows").glob("*.json")):
        stored = read_json(path)
        if not isinstance(stored, list) or not stored or not all(_is_row(row) for row in stored):
            raise corrupt_file_error(path)
        rows += stored
    return rows


def _is_row(row: Any) -> TypeGuard[StudyRow]:
    if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict):
        return False
    known = row.get("method") in {JOINT_KEY, REAL_KEY, *METHODS}
    return known and row.keys() >= ROW_COLUMNS and row["metrics"].keys() >= set(COLUMNS)


def _is_cost(cost: Any) -> TypeGuard[TrainingCost]:
    return isinstance(cost, dict) and cost.keys() >= COST_COLUMNS


def load_costs(out: Path) -> list[TrainingCost]:
    """Return the costs of all finished trainings. Raises ValueError for a corrupt file."""
    costs: list[TrainingCost] = []
    for path in sorted(out.glob("seed-*/*/train.json")):
        cost = read_json(path)
        if not _is_cost(cost):
            raise corrupt_file_error(path)
        costs.append(cost)
    return costs
