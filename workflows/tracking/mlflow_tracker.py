"""Trackers that log to MLflow. The only module that imports mlflow."""

import fcntl
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_RUN_TAG = "mlflow.parentRunId"  # tag of a child run
DESCRIPTION_TAG = "mlflow.note.content"  # Markdown at the top of the page of a run
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tag that makes MLflow's UI show an experiment as model training, not as one about language models. MLflow 3.17 uses
the browser setting "Model training" or ``?workflowType=machine_learning`` in the address."""

MLFLOW_HTTP_ENV = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Defaults of MLflow's client: no retries inside it, because the sync thread retries and can be stopped."""
_NON_METRIC_KEYS = ("step", "time", LATE_KEY)  # of an entry


@contextmanager
def sqlite_lock(uri: str) -> Iterator[None]:
    """Lock a SQLite store: two processes that create its tables at the same time both fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///") + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def connect(uri: str) -> "MlflowClient":
    """Return a client of a tracking server or store; the tables of a new SQLite store are created."""
    from mlflow import MlflowClient

    for logger in ("mlflow", "alembic"):  # they log a line per table of a new store
        logging.getLogger(logger).setLevel(logging.WARNING)
    with sqlite_lock(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    return client


class MlflowTracker:
    """One MLflow run, created or continued by its id."""

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        name: str,
        run_id: str | None = None,
        tags: Mapping[str, str],
    ) -> None:
        self._client = connect(uri)
        self._artifacts = artifact_root(uri)
        if run_id is None:
            with sqlite_lock(uri):  # two runs must not create one experiment twice
                run_id = self._create_run(experiment, name, tags)
        else:
            self._client.set_terminated(run_id, "RUNNING")
            if DESCRIPTION_TAG in tags:
                self._client.set_tag(run_id, DESCRIPTION_TAG, tags[DESCRIPTION_TAG])
        self.run_id: str | None = run_id
        self._run = run_id

    def _create_run(self, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        number = self._get_or_create_experiment(experiment)
        if DEDUP_TAG in tags:  # an earlier request with a lost response
            known = self._client.search_runs([number], f"tags.`{DEDUP_TAG}` = '{tags[DEDUP_TAG]}'", max_results=1)
            if known:
                return known[0].info.run_id
        run = self._client.create_run(number, run_name=name, tags=dict(tags))
        return run.info.run_id

    def _get_or_create_experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            return self._client.create_experiment(name, self._artifacts, tags=EXPERIMENT_TAGS)
        for key, value in EXPERIMENT_TAGS.items():
            if key not in known.tags:
                self._client.set_experiment_tag(known.experiment_id, key, value)
        return known.experiment_id

    @property
    def samples_seen(self) -> float:
        """Samples seen at the latest entry that MLflow has, -1 without entries."""
        return self._client.get_run(self._run).data.metrics.get(STEP_KEY, -1.0)

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Log the metrics of one step now."""
        del late  # MLflow accepts steps in any order
        self.send([{"step": step, "time": time.time(), **metrics}])

    def send(self, entries: Sequence[Entry]) -> None:
        """Send entries of JSON lines in order; MLflow counts a repeated entry once, by its time."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for entry in entries:
            at, step = int(entry["time"] * 1000), entry["step"]
            metrics = [Metric(k, float(v), at, step) for k, v in entry.items() if k not in _NON_METRIC_KEYS]
            if len(batch) + len(metrics) > MAX_METRICS_PER_CALL:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._run, metrics=batch)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log the parameters of the run; long values are truncated."""
        from mlflow.entities import Param

        pairs = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        for first in range(0, len(pairs), 100):  # a batch holds at most 100
            self._client.log_batch(self._run, params=pairs[first : first + 100])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file."""
        self._client.log_artifact(self._run, str(path), folder)

    def finish(self, *, failed: bool = False) -> None:
        """Set the final status of the run."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def missing_on_server(error: Exception) -> bool:
    """Return True if a request failed because its object does not exist."""
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def exists_on_server(error: Exception) -> bool:
    """Return True if a request failed because its object exists already."""
    return getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS"


def download_artifacts(uri: str, source: str, folder: Path) -> Path:
    """Copy the files of a logged model (``models:/ID``) below ``folder``; return the folder with them."""
    from mlflow.artifacts import download_artifacts as download

    return Path(download(artifact_uri=source, dst_path=str(folder), tracking_uri=uri))


def log_model(
    client: "MlflowClient",
    run_id: str,
    *,
    name: str,
    folder: Path,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> str:
    """Upload a folder as a logged model of a run and return its id."""
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(
        experiment,
        name=name,
        source_run_id=run_id,
        params={key: value[:MAX_PARAM_LENGTH] for key, value in params.items()},
        tags={key: value for key, value in tags.items() if value},
        model_type="mutual-forcing",
    )
    try:
        client.log_model_artifacts(model.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def log_dataset(client: "MlflowClient", run_id: str, dataset: str, fingerprint: str, *, context: str) -> None:
    """Log a dataset as an input of a run, with the fingerprint of its preprocessing as digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = Dataset(
        name=dataset.rstrip("/").rsplit("/", 1)[-1] or fingerprint,
        digest=fingerprint[:36],
        source_type="s3" if dataset.startswith("s3://") else "local",
        source=json.dumps({"uri": dataset}),
    )
    client.log_inputs(run_id, [DatasetInput(found, [InputTag("mlflow.data.context", context)])])


def log_model_metrics(
    client: "MlflowClient",
    run_id: str,
    model_id: str,
    metrics: Mapping[str, float],
    *,
    dataset: tuple[str, str],
    at: float,
) -> None:
    """Log metrics that are linked to a logged model and to a dataset (name, fingerprint; empty: none)."""
    from mlflow.entities import Metric

    name, digest = dataset
    found = [
        Metric(
            f"model/{key}",
            float(value),
            int(at * 1000),
            0,
            model_id=model_id,
            dataset_name=name.rstrip("/").rsplit("/", 1)[-1] or None,
            dataset_digest=digest[:36] or None,
            run_id=run_id,
        )
        for key, value in metrics.items()
    ]
    for first in range(0, len(found), MAX_METRICS_PER_CALL):
        client.log_batch(run_id, metrics=found[first : first + MAX_METRICS_PER_CALL])


def mlflow_enabled() -> bool:
    """Return True if mlflow is installed and ``MFCTL_TRACKER=json`` is not set."""
    return os.environ.get("MFCTL_TRACKER") != "json" and importlib.util.find_spec("mlflow") is not None


def artifact_root(uri: str) -> str | None:
    """Return the artifact folder of experiments in a SQLite store, next to it; None if the server decides.

    MLflow's default is the current directory of the first process that logs, such as a Ray worker's scratch folder.
    """
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
    """Return an MLflow tracker, or JSON lines in ``folder`` without mlflow or with MFCTL_TRACKER=json.

    For results that are not a time series, such as a sweep: entries may come in any order, and errors of MLflow are
    raised. ``parent`` is the id of the parent run.
    """
    if not mlflow_enabled():
        return JsonLinesTracker(folder, ordered=False)
    parent_tag = {PARENT_RUN_TAG: parent} if parent else {}
    return MlflowTracker(uri, experiment=experiment, name=name, run_id=run_id, tags={**(tags or {}), **parent_tag})
