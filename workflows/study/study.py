"""Run a study and publish its results as page, plots and MLflow runs (``mfctl study``)."""

import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfcore.errors import UserInputError, check_range
from workflows.config import serialization
from workflows.study.claims import check_claims
from workflows.study.config import study_preset
from workflows.study.results_table import ResultSeries, ResultTable, StudyRow, TrainingCost, method_title
from workflows.study.scheduler import import_networks, load_costs, load_scores, parse_seeds, run_tasks, select_methods
from workflows.study.tables import to_markdown
from workflows.study.tasks import pending_tasks, plan_tasks
from workflows.tracking.mlflow_sync import SYNC_STATE_FILE
from workflows.tracking.mlflow_tracker import mlflow_enabled, open_tracker
from workflows.utils.json_io import read_json, write_json

EXPERIMENT = "study"
MAX_MINUTES = 525_600  # one year


def run_study(
    *,
    out: str,
    preset: str,
    seeds: str,
    methods: Sequence[str],
    device: str,
    workers: int,
    minutes: float | None,
    sets: Sequence[str],
    dry_run: bool,
    tracking: str,
    networks: str | None = None,
) -> dict[str, Any]:
    """Run the pending tasks in ``out``, publish the results, and return a summary.

    Failed tasks are listed in ``failed`` with their errors; the page covers the others. ``networks``: folder of another
    study to copy trained networks from.
    """
    config = serialization.apply_overrides(study_preset(preset), serialization.parse_overrides(sets))
    check_range("--minutes", minutes, 0, MAX_MINUTES, above=True)
    try:
        torch.device(device)
    except RuntimeError:
        raise UserInputError(f"--device {device}: unknown device. Give cpu, cuda or cuda:1") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserInputError(f"--device {device}: torch finds no GPU. Omit --device to run on the CPU")
    wanted = select_methods([name.strip() for name in methods], parse_seeds(seeds))
    if dry_run:
        return {"config": serialization.to_dict(config), "methods": {m: list(s) for m, s in wanted.items()}}
    folder = Path(out)
    if networks:
        copied = import_networks(config, Path(networks), folder, wanted)
        own = [task.name for task in pending_tasks(folder, plan_tasks(config, wanted)) if task.kind == "train"]
        print(
            f"copied {copied} trained networks from {networks}"
            + (f"; not found there, to be trained: {', '.join(own)}" if own else ""),
            file=sys.stderr,
        )
    outcome = run_tasks(
        config,
        folder,
        wanted,
        workers=workers,
        device=device,
        minutes=minutes,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    unfinished = {"results": None, "done": outcome.done, "failed": outcome.failed}
    if not outcome.done:
        return unfinished | {"next": "stopped at --minutes. Run the same command to continue"}
    if outcome.failed and not load_scores(folder):
        return unfinished | {"next": "no task was scored. Fix the errors, then run the same command again"}
    settings = serialization.to_dict(config)
    result = _publish(folder, max(config.counts), tracking=tracking, settings=settings, device=device)
    return result | {"failed": outcome.failed}


def _publish(folder: Path, max_steps: int, *, tracking: str, settings: dict[str, Any], device: str) -> dict[str, Any]:
    rows, costs = load_scores(folder), load_costs(folder)
    table = ResultTable(rows, costs)
    results = folder / "results.json"
    results.write_text(json.dumps(rows, indent=1))
    page = folder / "results.md"
    page.write_text(_page_header(costs, device) + to_markdown(table, max_steps))
    plot_files = _draw_plots(rows, folder)
    claims = [vars(claim) for claim in check_claims(table, max_steps)]
    (folder / "bars.json").write_text(json.dumps(claims, indent=1))
    parent = _log_to_tracker(folder, table, [results, page, *plot_files], uri=tracking, settings=settings)
    return {
        "results": str(results),
        "mlflow_parent_run": parent,
        "page": page.read_text(),
        "bars": claims,
        "plots": [str(path) for path in plot_files],
        "done": True,
    }


def _page_header(costs: Sequence[TrainingCost], device: str) -> str:
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    hours = sum(cost["seconds"] for cost in costs) / 3600
    version = f"commit {commit}, " if commit else ""
    made_by = f"{version}torch {torch.__version__} on {device}"
    return f"# Study\n\nMade by {made_by}; training took {hours:.1f} hours in all.\n\n"


def _draw_plots(rows: Sequence[StudyRow], folder: Path) -> list[Path]:
    try:
        from workflows.study import plots
    except ModuleNotFoundError as missing:  # the same command draws on a machine with matplotlib
        print(f"warning: no plots: {missing.name} is not installed", file=sys.stderr)
        return []
    return plots.draw_plots(rows, folder)


def _log_to_tracker(
    folder: Path, table: ResultTable, files: Sequence[Path], *, uri: str, settings: dict[str, Any]
) -> str | None:
    """Log the page and a child run per method and mode (step: NFE); return the parent's ID.

    ``mlflow.json`` records what the store has: the same store receives changes only, another one everything.
    """
    record_path = folder / SYNC_STATE_FILE
    store = uri if mlflow_enabled() else "json"
    record: dict[str, Any] = read_json(record_path, default={})
    if record.get("store") != store:
        record = {"store": store, "parent": None, "runs": {}}
    open_run = partial(open_tracker, uri=uri, experiment=EXPERIMENT)
    parent = open_run(folder=folder / "log", name=folder.name, run_id=record["parent"])
    record["parent"] = parent.run_id
    parent.params(serialization.flatten(settings))
    for path in files:
        parent.artifact(path)
    for series in dict.fromkeys(key.series for key in table.keys if key.steps):
        name = f"{series.method}-{series.mode}" + ("-guided" if series.guided else "")
        name += "" if series.sampler == "deterministic" else f"-{series.sampler}"
        points = _points(table, series)
        digest = hashlib.sha256(json.dumps(points).encode()).hexdigest()
        previous = record["runs"].get(name, {})
        if previous.get("digest") == digest:
            continue
        child = open_run(
            folder=folder / "log" / name,
            name=name,
            run_id=previous.get("run"),
            parent=parent.run_id,
            tags={"method": method_title(series.method)},
        )
        for nfe, metrics in points.items():
            child.log(nfe, metrics)
        child.finish()
        record["runs"][name] = {"run": child.run_id, "digest": digest}
        write_json(record_path, record)
    parent.finish()
    write_json(record_path, record)
    return parent.run_id


def _points(table: ResultTable, series: ResultSeries) -> dict[int, dict[str, float]]:
    """Return the means over seeds of all metrics and windows, by number of function evaluations."""
    points: dict[int, dict[str, float]] = defaultdict(dict)
    for key in table.keys:
        if key.series == series and key.steps:
            values = {f"{key.window}/{name}": value.mean for name, value in table.row(key).items()}
            points[key.steps * (1 + series.guided)] |= values
    return points
