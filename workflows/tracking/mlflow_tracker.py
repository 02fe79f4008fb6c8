import fcntl
import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflows.tracking.tracker import (
    DEDUP_TAG,
    LATE_KEY,
    MAX_METRICS_PER_CALL,
    MAX_PARAM_LENGTH,
    STEP_KEY,
    Entry,
    JsonLinesTracker,
    Tracker,
)

PARENT_RUN_TAG = "mlflow.parentRunId"  # tag of a run that belongs to another one
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tag by which MLflow's UI tells a training's experiment from one about language models. (3.17 asks the browser's
own switch, "Model training", instead, or ``?workflowType=machine_learning`` in the address.)"""

_MARKS = ("step", "time", LATE_KEY)  # of an entry, and no metrics


@contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Two processes that make the tables of one new SQLite store at once would both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///") + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class MlflowTracker:
    """One MLflow run, started anew or continued by its id."""

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        name: str,
        run_id: str | None = None,
        tags: Mapping[str, str],
    ) -> None:
        from mlflow import MlflowClient

        for chatty in ("mlflow", "alembic"):  # a word per table of a new store
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with sqlite_lock(uri):
            self._client = MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)  # makes the tables of a new store
        self._artifacts = artifact_root(uri)
        if run_id is None:
            with sqlite_lock(uri):  # two runs must not create one experiment twice
                run_id = self._start(experiment, name, tags)
        else:
            self._client.set_terminated(run_id, "RUNNING")
        self.run_id: str | None = run_id
        self._run = run_id

    def _start(self, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        number = self._experiment(experiment)
        if DEDUP_TAG in tags:  # asked for before, and the answer was lost
            known = self._client.search_runs([number], f"tags.`{DEDUP_TAG}` = '{tags[DEDUP_TAG]}'", max_results=1)
            if known:
                return known[0].info.run_id
        run = self._client.create_run(number, run_name=name, tags=dict(tags))
        return run.info.run_id

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            return self._client.create_experiment(name, self._artifacts, tags=EXPERIMENT_TAGS)
        for key, value in EXPERIMENT_TAGS.items():
            if key not in known.tags:
                self._client.set_experiment_tag(known.experiment_id, key, value)
        return known.experiment_id

    @property
    def samples_seen(self) -> float:
        """Of the latest entry that MLflow has; -1 when it has none."""
        return self._client.get_run(self._run).data.metrics.get(STEP_KEY, -1.0)

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        del late  # MLflow takes any step at any time
        self.send([{"step": step, "time": time.time(), **metrics}])

    def send(self, entries: Sequence[Entry]) -> None:
        """Entries of JSON lines, in order. The same entry twice counts once: a store tells metrics by their time."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for entry in entries:
            at, step = int(entry["time"] * 1000), entry["step"]
            metrics = [Metric(k, float(v), at, step) for k, v in entry.items() if k not in _MARKS]
            if len(batch) + len(metrics) > MAX_METRICS_PER_CALL:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._run, metrics=batch)

    def params(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        pairs = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        for first in range(0, len(pairs), 100):  # a batch holds at most 100
            self._client.log_batch(self._run, params=pairs[first : first + 100])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._client.log_artifact(self._run, str(path), folder)

    def finish(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def mlflow_enabled() -> bool:
    """Installed, and not refused by ``MFCTL_TRACKER=json``."""
    return os.environ.get("MFCTL_TRACKER") != "json" and importlib.util.find_spec("mlflow") is not None


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
) -> Tracker:
    """MLflow where it is installed, else (or when MFCTL_TRACKER=json asks for it) JSON lines in ``folder``.

    For what is not a course in time, such as a sweep: entries may come in any order, and an error of MLflow is raised.
    ``parent``: id of the run that this one belongs to.
    """
    if not mlflow_enabled():
        return JsonLinesTracker(folder, ordered=False)
    belongs = {PARENT_RUN_TAG: parent} if parent else {}
    return MlflowTracker(uri, experiment=experiment, name=name, run_id=run_id, tags={**(tags or {}), **belongs})
