"""Where a run's numbers go. The only file that imports mlflow; without it they go to JSON lines.

Metrics of MLflow are append-only, so a run that resumes from a checkpoint repeats no step that was logged before: a
tracker drops what comes at or before its last step.
"""

import fcntl
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from workflows.environment import absolute

PARENT = "mlflow.parentRunId"  # tag of a run that belongs to another one
STEP = "samples_seen"  # logged with every entry: tells a resumed run where the log ends
MAX_VALUE = 500  # longest parameter value that every MLflow store accepts


class Tracker(Protocol):
    """One run's log."""

    @property
    def run_id(self) -> str | None:
        """Of MLflow, or None."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Everything of one step, at once; nothing happens for a step that was logged before."""
        ...

    def params(self, values: Mapping[str, Any]) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def finish(self, *, failed: bool = False) -> None: ...


class Silent:
    """The tracker of every rank but the first."""

    run_id = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def finish(self, *, failed: bool = False) -> None:
        pass


class JsonLines:
    """``metrics.jsonl`` and ``params.json`` in a folder; artifacts stay where they are and are listed."""

    run_id = None

    def __init__(self, folder: Path, *, ordered: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ordered = folder, ordered
        self._last = max((entry["step"] for entry in read_lines(folder / "metrics.jsonl")), default=-1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._ordered and step <= self._last:
            return
        self._last = step
        entry = {"step": step, "time": time.time(), **metrics}
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def params(self, values: Mapping[str, Any]) -> None:
        (self._folder / "params.json").write_text(json.dumps(dict(values), indent=1))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        with (self._folder / "artifacts.jsonl").open("a") as file:
            file.write(json.dumps({"path": str(path), "folder": folder}) + "\n")

    def finish(self, *, failed: bool = False) -> None:
        pass


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON lines file; a last line cut short by a crash is left out."""
    out: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that make the tables of one new SQLite store at once would both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///") + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Mlflow:
    """One MLflow run, started anew or continued by its id."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        run_id: str | None,
        tags: Mapping[str, str],
        *,
        ordered: bool = True,
    ) -> None:
        from mlflow import MlflowClient

        for chatty in ("mlflow", "alembic"):  # a word per table of a new store
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with one_at_a_time(uri):
            self._client = MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)  # makes the tables of a new store
        self._artifacts = artifact_root(uri)
        self._last, self._ordered = -1, ordered
        if run_id is None:
            with one_at_a_time(uri):  # two runs must not create one experiment twice
                run_id = self._start(experiment, name, tags)
        else:
            self._client.set_terminated(run_id, "RUNNING")
            history = self._client.get_metric_history(run_id, STEP)
            self._last = max((metric.step for metric in history), default=-1)
        self.run_id: str | None = run_id
        self._run = run_id

    def _start(self, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment, self._artifacts)
        run = self._client.create_run(number, run_name=name, tags=dict(tags))
        return run.info.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._ordered and step <= self._last:
            return
        from mlflow.entities import Metric

        self._last = step
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        pairs = [Param(key, str(value)[:MAX_VALUE]) for key, value in values.items()]
        for first in range(0, len(pairs), 100):  # a batch holds at most 100
            self._client.log_batch(self._run, params=pairs[first : first + 100])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._client.log_artifact(self._run, str(path), folder)

    def finish(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def tracking_uri(runs_dir: str | Path) -> str:
    """``MLFLOW_TRACKING_URI``, else one SQLite file under the runs folder, by absolute path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{absolute(str(runs_dir))}/mlflow.db"
    prefix = "sqlite:///"
    return prefix + absolute(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri


def artifact_root(uri: str) -> str | None:
    """Where an experiment in a SQLite store keeps files: beside the store (MLflow's default is the current directory of
    whoever logs first, which is a Ray worker's scratch folder). None: the server decides."""
    prefix = "sqlite:///"
    return (Path(uri.removeprefix(prefix)).parent / "mlartifacts").as_uri() if uri.startswith(prefix) else None


def open_tracker(
    *,
    uri: str,
    folder: Path,
    experiment: str,
    name: str,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    ordered: bool = True,
) -> Tracker:
    """MLflow where it is installed, else (or when MFCTL_TRACKER=json asks for it) JSON lines in ``folder``.

    ``parent``: id of the run that this one belongs to. ``ordered`` False: steps are places on an axis, not moments of a
    course (a sweep's evaluations), so none is dropped for coming after a later one.
    """
    if os.environ.get("MFCTL_TRACKER") == "json" or importlib.util.find_spec("mlflow") is None:
        return JsonLines(folder, ordered=ordered)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    belongs = {PARENT: parent} if parent else {}
    return Mlflow(uri, experiment, name, run_id, {**(tags or {}), **belongs}, ordered=ordered)


def log_all(tracker: Tracker, paths: Iterable[Path], folder: str) -> None:
    for path in paths:
        tracker.artifact(path, folder)
