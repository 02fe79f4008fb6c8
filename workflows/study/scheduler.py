"""``mfctl study``: all tasks of a study on so many processes, then the table."""

import json
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

from workflows.config.serialization import diff
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
ROW_COLUMNS = {"method", "mode", "steps", "nfe", "guidance", "seed", "window"}
COST_COLUMNS = {"method", "seed", "steps", "history_use", "state_bytes", "cpu_seconds", "seconds"}


def parse_seeds(text: str) -> list[int]:
    """``3`` is how many, from 0 on; ``3,4`` are these two. ValueError for what is neither."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts if part.strip() or len(parts) == 1):
        raise ValueError(f"--seeds {text}: give how many, such as 3, or which, such as 3,4,5")
    which = [int(part) for part in parts if part.strip()]
    seeds = which if len(parts) > 1 else list(range(which[0]))
    if not seeds:
        raise ValueError(f"--seeds {text}: a study needs at least one")
    return sorted(set(seeds))


def select_methods(names: Sequence[str], seeds: Sequence[int]) -> dict[str, Sequence[int]]:
    """Which seeds each method is run with: the core ones and those that are named with all, others of a group with
    the first.
    """
    wanted: dict[str, Sequence[int]] = {}
    for name in names:
        for method in GROUPS.get(name, (name,)):
            whole = method in GROUPS["core"] or method in names
            wanted[method] = seeds if whole else seeds[:1]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)}: choose from {', '.join([*GROUPS, *METHODS])}")
    return wanted


def claim_study_dir(config: StudyConfig, out: Path) -> None:
    """A study goes on only with the configuration that it began with."""
    path = out / "study.json"
    if path.exists():
        differences = _differences(path, config)
        if differences:
            raise ValueError(f"{out} holds a study with other settings ({'; '.join(differences)}): choose a new folder")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out names the folder of a study")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no study: choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(config))
    except OSError as error:
        raise ValueError(f"cannot keep a study in {out}: {error.strerror}") from None


def _differences(path: Path, config: StudyConfig, *, ignore: Collection[str] = ()) -> list[str]:
    """``a.b: 1 -> 2`` for what ``config`` has otherwise than the study of this file."""
    wanted = json.loads(json.dumps(asdict(config)))
    try:
        stored = read_json(path)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged, or of another program: choose a new folder")
    for settings in (stored, wanted):
        for key in ignore:
            settings.pop(key, None)
    return diff(stored, wanted)


def import_networks(config: StudyConfig, source: Path, out: Path, methods: dict[str, Sequence[int]]) -> int:
    """Copy the trained networks of ``methods`` in the study in ``source`` that ``out`` has not; how many they were.

    ValueError where ``config`` would have trained them in another way: they may only be sampled in one.
    """
    path = source / "study.json"
    if not path.exists():
        raise ValueError(f"{source} holds no study: give the folder that --out named for one")
    differences = _differences(path, config, ignore=SAMPLING)
    if differences:
        raise ValueError(
            f"the networks in {source} were trained with other settings ({'; '.join(differences)}): give the same ones "
            f"with --set; only {', '.join(SAMPLING)} may differ"
        )
    claim_study_dir(config, out)
    copied = 0
    for task in plan_tasks(config, methods):
        if task.kind != "train":
            continue
        record, folder = task.result_path(source), task.result_path(out).parent
        if (folder / record.name).exists() or not record.exists() or not (record.parent / WEIGHTS).exists():
            continue
        if (folder / STEP_FILE).exists():  # a training of this study's own goes on
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, LOG_FILE, record.name):  # the record last: it says that a training is done
            if (record.parent / name).exists():
                shutil.copy(record.parent / name, folder / name)
        copied += 1
    return copied


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """How a study was pending."""

    done: bool  # False: the time was up, and the same call goes on
    failed: dict[str, str] = field(default_factory=dict)  # tasks by name, with what went wrong


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
    """Do what is missing. A task that fails takes those that need it with it, and no other."""
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes {minutes:g}: give more than none, or leave it out for no limit")
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
                    if not isinstance(error, ValueError):  # no wrong number, a fault: where it is
                        traceback.print_exception(error)
                    failed[task.name] = f"{type(error).__name__}: {error}"
                    skipped = _dependents(task, pending)
                    pending = [other for other in pending if other not in skipped]
                    log(f"{task.name} failed, and with it {len(skipped)} tasks that need it: {failed[task.name]}")
                else:
                    log(f"{total - len(pending) - len(running) - len(failed)} of {total}: {task.name}")
    return StudyOutcome(done=True, failed=failed)


def _dependents(task: StudyTask, among: Sequence[StudyTask]) -> list[StudyTask]:
    """Those that cannot be done without ``task``, at once or through another."""
    found: list[StudyTask] = []
    for other in among:  # what is needed comes first
        if other.dependency == task or other.dependency in found:
            found.append(other)
    return found


def _ready(pending: Sequence[StudyTask], out: Path) -> Iterator[StudyTask]:
    yield from (task for task in pending if task.is_ready(out))


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """So many processes, which end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(workers,))


def _init_worker(workers: int) -> None:
    """A process of the pool: has its share of the threads, and ends when the one that started it is gone, however."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # what was saved is whole, and the same command goes on from there


def load_scores(out: Path) -> list[StudyRow]:
    """All scores on disk. ValueError names a file that holds none."""
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
    """What each finished training took. ValueError names a file that does not log it."""
    costs: list[TrainingCost] = []
    for path in sorted(out.glob("seed-*/*/train.json")):
        cost = read_json(path)
        if not _is_cost(cost):
            raise corrupt_file_error(path)
        costs.append(cost)
    return costs
