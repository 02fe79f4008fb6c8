"""``mfctl study``: all units of a study on so many processes, then the table."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from workflows.study.config import SAMPLING, StudyConfig
from workflows.study.methods import GROUPS, METHODS
from workflows.study.units import LOG, WEIGHTS, OutOfTime, Unit, all_units, missing, run_unit

POLL_SECONDS = 1.0


def study_methods(names: Sequence[str], seeds: int) -> dict[str, Sequence[int]]:
    """Which seeds each method is run with: the core ones with all, the others with the first. Groups count as names."""
    wanted = [method for name in names for method in GROUPS.get(name, (name,))]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)}: choose from {', '.join([*GROUPS, *METHODS])}")
    return {name: range(seeds if name in GROUPS["core"] else 1) for name in wanted}


def check_folder(config: StudyConfig, out: Path) -> None:
    """A study goes on only with the configuration that it began with."""
    wanted = json.loads(json.dumps(asdict(config)))
    path = out / "study.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no study: choose a new folder")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1))
        return
    found = json.loads(path.read_text())
    if found != wanted:
        odd = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise ValueError(f"{out} holds a study with other settings ({', '.join(odd)}): choose a new folder")


def take_networks(config: StudyConfig, source: Path, out: Path, methods: dict[str, Sequence[int]]) -> int:
    """Copy the trained networks of ``methods`` in the study in ``source`` that ``out`` has not; how many they were.

    ValueError where ``config`` would have trained them in another way: they may only be sampled in one.
    """
    path = source / "study.json"
    if not path.exists():
        raise ValueError(f"{source} holds no study: give the folder that --out named for one")
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(asdict(config)))
    odd = sorted(k for k in (wanted.keys() | found.keys()) - {*SAMPLING} if wanted.get(k) != found.get(k))
    if odd:
        raise ValueError(
            f"the networks in {source} were trained with other settings ({', '.join(odd)}): give the same ones "
            f"with --set; only {', '.join(SAMPLING)} may differ"
        )
    check_folder(config, out)
    taken = 0
    for unit in all_units(config, methods):
        if unit.kind != "train":
            continue
        record, folder = unit.result(source), unit.result(out).parent
        if folder.exists() or not record.exists() or not (record.parent / WEIGHTS).exists():
            continue
        folder.mkdir(parents=True)
        for name in (WEIGHTS, LOG, record.name):  # the record last: it says that a training is done
            if (record.parent / name).exists():
                shutil.copy(record.parent / name, folder / name)
        taken += 1
    return taken


def run_study(
    config: StudyConfig,
    out: Path,
    methods: dict[str, Sequence[int]],
    *,
    workers: int,
    device: str,
    minutes: float | None,
    say: Any = print,
) -> bool:
    """Do what is missing. False when the time was up before everything was done; the same call then goes on."""
    check_folder(config, out)
    deadline = time.time() + 60 * minutes if minutes else float("inf")
    left = missing(out, all_units(config, methods))
    total = len(left)
    if not left:
        return True
    with pool_of(workers) as pool:
        running: dict[Future[None], Unit] = {}
        while left or running:
            for unit in list(_ready(left, out)):
                if len(running) >= workers or time.time() > deadline:
                    break
                left.remove(unit)
                running[pool.submit(run_unit, config, out, unit, device, deadline)] = unit
            if not running:
                return False
            done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                unit = running.pop(future)
                try:
                    future.result()
                except OutOfTime as stop:
                    say(str(stop))
                    left.append(unit)
                else:
                    say(f"{total - len(left) - len(running)} of {total}: {unit.name}")
    return True


def _ready(left: Sequence[Unit], out: Path) -> Iterator[Unit]:
    yield from (unit for unit in left if unit.ready(out))


def pool_of(workers: int) -> ProcessPoolExecutor:
    """So many processes, which end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(workers,))


def _begin(workers: int) -> None:
    """A process of the pool: has its share of the threads, and ends when the one that started it is gone, however."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)  # what was saved is whole, and the same command goes on from there


def read_rows(out: Path) -> list[dict[str, Any]]:
    """All scores on disk."""
    return [row for path in sorted((out / "rows").glob("*.json")) for row in json.loads(path.read_text())]


def read_costs(out: Path) -> list[dict[str, Any]]:
    """What each finished training took."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("seed-*/*/train.json"))]
