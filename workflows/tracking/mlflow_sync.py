"""Durable log of a training run: written to the run directory at once, sent to MLflow when the server responds.

An unreachable server must not stop or delay training, and must not lose a number. ``log`` only appends to JSON lines.
A background thread sends entries in order, retries until they arrive, and stores its position in ``mlflow.json``.
Memory is bounded because the backlog stays in the files. After a kill, the next process sends the rest. A batch is
sent again if its response was lost. MLflow identifies metrics by name, step, time and value, so it counts once.

    metrics.jsonl, params.json, artifacts.jsonl   the log; complete, with or without a server
    mlflow.json                                   the MLflow run, and how much it has received
"""

import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from workflows.tracking.mlflow_tracker import MLFLOW_HTTP_ENV, MlflowTracker, mlflow_enabled
from workflows.tracking.tracker import (
    ARTIFACTS,
    DEDUP_TAG,
    LATE_KEY,
    METRICS,
    PARAMS,
    STEP_KEY,
    Entry,
    JsonLinesTracker,
    Tracker,
    iter_json_lines,
)
from workflows.utils.environment import hide_passwords
from workflows.utils.json_io import read_intact_json, write_text_atomically

SYNC_STATE_FILE = "mlflow.json"
START_SECONDS = 15.0  # limit for the first attempt at the start of a run
FLUSH_SECONDS = 30.0  # limit for the backlog at the end of a run
RETRY_BACKOFF_S = (1.0, 60.0)  # seconds between attempts: the first, doubled up to the second
BATCH_LINES = 50  # entries per request

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncState:
    """Content of ``mlflow.json``."""

    uri: str  # without a password
    key: str  # tag of the run, so that a repeated creation finds it
    run: str | None = None  # MLflow's run id
    metrics: int = 0  # bytes of metrics.jsonl that were sent
    last_step: int = -1
    params: bool = False
    artifacts: int = 0  # bytes of artifacts.jsonl that were sent
    status: str | None = None  # last status that was sent; None: running


def load_sync_state(folder: Path, uri: str) -> SyncState:
    """Return what ``uri`` has received of the log in ``folder``; a new state for another server."""
    path = folder / SYNC_STATE_FILE
    stored = read_intact_json(path) or {}
    shown = hide_passwords(uri)
    if hide_passwords(stored.get("uri", "")) != shown:
        stored = {}
    known: dict[str, Any] = {f.name: stored[f.name] for f in fields(SyncState) if f.name in stored}
    return replace(SyncState(uri=shown, key=secrets.token_hex(16)), **known | {"uri": shown})


def save_sync_state(folder: Path, sent: SyncState) -> None:
    """Write ``mlflow.json`` atomically."""
    write_text_atomically(folder / SYNC_STATE_FILE, json.dumps(asdict(sent), indent=1) + "\n")


class DurableTracker:
    """Tracker of a training run: JSON lines first, MLflow by a background thread."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str]
    ) -> None:  # fmt: skip
        for variable, value in MLFLOW_HTTP_ENV.items():
            os.environ.setdefault(variable, value)
        self._folder = folder
        self._lines = JsonLinesTracker(folder)
        self._sync = SyncThread(folder, uri=uri, experiment=experiment, name=name, tags=tags)
        self._sync.start()
        self._sync.wait_first_attempt(START_SECONDS)

    @property
    def run_id(self) -> str | None:
        """MLflow's run id, None until the first response."""
        return self._sync.sent.run

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        """Append the metrics of one step; see ``Tracker.log``."""
        self._lines.log(step, metrics, late=late)
        self._sync.notify()

    def params(self, values: Mapping[str, Any]) -> None:
        """Store the parameters of the run."""
        self._lines.params(values)
        self._sync.notify()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """List a file for upload."""
        self._lines.artifact(path, folder)
        self._sync.notify()

    def finish(self, *, failed: bool = False) -> None:
        """Send the backlog for at most FLUSH_SECONDS; log a warning with the rest."""
        self._sync.flush("FAILED" if failed else "FINISHED", FLUSH_SECONDS)
        if error := self._sync.error:
            _LOGGER.warning(
                f"MLflow at {self._sync.sent.uri} did not take the whole log ({error}). Nothing is lost: "
                f"{describe_backlog(self._folder, self._sync.sent)} are stored in {self._folder}; "
                "the same command sends them when the server responds"
            )


class SyncThread(threading.Thread):
    """Thread that sends new entries of a run's log, in order, one attempt at a time."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str]
    ) -> None:  # fmt: skip
        super().__init__(name="mlflow", daemon=True)
        self.sent = load_sync_state(folder, uri)
        self._uri = uri
        self.error: str | None = None  # of the latest attempt, if it failed
        self._folder = folder
        self._experiment = experiment
        self._name = name
        self._tags = {**tags, DEDUP_TAG: self.sent.key}
        self._status: str | None = None
        self._client: MlflowTracker | None = None
        self._samples_seen = -1.0
        self._changed = threading.Condition()
        self._requested = 1
        self._completed = 0
        self._attempts = 0
        self._flushing = False
        self._stopped = False
        self._save_state()  # the key must be on disk before it is used

    def notify(self) -> None:
        """Request another attempt: the log has new entries."""
        with self._changed:
            self._requested += 1
            self._changed.notify_all()

    def wait_first_attempt(self, limit: float) -> None:
        """Wait at most ``limit`` seconds for the first attempt to finish, successful or not."""
        with self._changed:
            self._changed.wait_for(lambda: self._attempts > 0, limit)

    def flush(self, status: str, limit: float) -> None:
        """Send the backlog and the status; stop after ``limit`` seconds."""
        with self._changed:
            self._status = status
            self._flushing = True
            self._requested += 1
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._completed == self._requested, limit) and self.error is None:
                self.error = f"no response within {limit:.0f} s"
            self._stopped = True
            self._changed.notify_all()

    def run(self) -> None:
        """Send whenever entries are new, with exponential backoff after failures."""
        wait = RETRY_BACKOFF_S[0]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requested > self._completed or self._stopped)
                if self._stopped:
                    return
                requested = self._requested
            try:
                self._send()
            except Exception as error:  # of the network, server or store: the log stays on disk
                self._record_failure(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._flushing, wait)
                    if self._flushing and not self._stopped:
                        self._changed.wait_for(lambda: self._stopped, RETRY_BACKOFF_S[0])
                wait = min(2 * wait, RETRY_BACKOFF_S[1])
            else:
                self._record_success(requested)
                wait = RETRY_BACKOFF_S[0]

    def _record_failure(self, error: Exception) -> None:
        self._client = None
        with self._changed:
            is_first = self.error is None
            self.error = first_line(error)
            self._attempts += 1
            self._changed.notify_all()
        if is_first and not self._stopped:
            _LOGGER.warning(
                f"MLflow at {self.sent.uri} does not respond ({self.error}). Training continues; "
                f"the log is kept in {self._folder} and sent when the server responds"
            )

    def _record_success(self, requested: int) -> None:
        with self._changed:
            had_failed = self.error is not None
            self.error = None
            self._completed = requested
            self._attempts += 1
            self._changed.notify_all()
        if had_failed and not self._stopped:
            _LOGGER.info(f"MLflow at {self.sent.uri} responds again and has the whole log")

    def _send(self) -> None:
        client = self._connect()
        if not self.sent.params and (self._folder / PARAMS).exists():
            client.params(read_intact_json(self._folder / PARAMS) or {})
            self._save_state(params=True)
        for entries, end in read_batches(self._folder / METRICS, self.sent.metrics):
            new = drop_repeated_steps(entries, self.sent.last_step)
            client.send([e for e in new if e.get(STEP_KEY, self._samples_seen + 1) > self._samples_seen])
            steps = [e["step"] for e in new if LATE_KEY not in e]
            self._save_state(metrics=end, last_step=max([self.sent.last_step, *steps]))
        for entry, end in iter_json_lines(self._folder / ARTIFACTS, self.sent.artifacts):
            self._upload(client, Path(entry["path"]), entry["folder"])
            self._save_state(artifacts=end)
        if self._status != self.sent.status:
            client.finish(failed=self._status == "FAILED")
            self._save_state(status=self._status)

    def _connect(self) -> MlflowTracker:
        """Return the client of the run, which is created once and marked as running."""
        if self._client is None:
            sent = self.sent
            self._client = MlflowTracker(
                self._uri, experiment=self._experiment, name=self._name, run_id=sent.run, tags=self._tags
            )
            self._save_state(run=self._client.run_id, status=None)
            self._samples_seen = self._client.samples_seen  # entries with a lost response have arrived
        return self._client

    def _upload(self, client: MlflowTracker, path: Path, folder: str | None) -> None:
        if path.exists():
            client.artifact(path, folder)
        else:
            _LOGGER.warning(f"{path} does not exist: it is not uploaded to MLflow")

    def _save_state(self, **changes: Any) -> None:
        """Save the position, unless ``flush`` has ended: another process may have continued the run."""
        self.sent = replace(self.sent, **changes)
        if not self._stopped:
            save_sync_state(self._folder, self.sent)


def read_batches(path: Path, start: int) -> Iterator[tuple[list[Entry], int]]:
    """Yield batches of at most BATCH_LINES entries from byte ``start`` on, each with its end byte."""
    entries: list[Entry] = []
    end = start
    for entry, end in iter_json_lines(path, start):
        entries.append(entry)
        if len(entries) == BATCH_LINES:
            yield entries, end
            entries = []
    if entries:
        yield entries, end


def drop_repeated_steps(entries: Sequence[Entry], last: int) -> list[Entry]:
    """Return the entries without steps up to ``last``, which a worker of a dead driver may have repeated.

    An entry with STEP_KEY begins a step, others add to the current one. A late entry may belong to any earlier step.
    """
    out: list[Entry] = []
    for entry in entries:
        if LATE_KEY in entry:
            out.append(entry)
        elif entry["step"] > last or (entry["step"] == last and STEP_KEY not in entry):
            out.append(entry)
            last = entry["step"]
    return out


def describe_backlog(folder: Path, sent: SyncState) -> str:
    """Return the unsent part of a log as text."""
    steps = sum(1 for _ in iter_json_lines(folder / METRICS, sent.metrics))
    files = sum(1 for _ in iter_json_lines(folder / ARTIFACTS, sent.artifacts))
    parts = [f"{steps} log entries", f"{files} files", *([] if sent.params else ["the parameters"])]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def has_backlog(folder: Path, uri: str) -> bool:
    """Return True if the log of a finished run is not completely in MLflow."""
    sent = load_sync_state(folder, uri)
    sizes = {name: (folder / name).stat().st_size for name in (METRICS, ARTIFACTS) if (folder / name).exists()}
    behind = sent.metrics < sizes.get(METRICS, 0) or sent.artifacts < sizes.get(ARTIFACTS, 0)
    return mlflow_enabled() and (behind or sent.status is None)


def open_durable_tracker(
    folder: Path, *, uri: str, experiment: str, tags: Mapping[str, str]
) -> Tracker:  # fmt: skip
    """Open or continue the log of the training run in ``folder``; its name is the MLflow run name.

    Without MLflow, or with MFCTL_TRACKER=json, the log stays on disk and can be sent later.
    """
    if not mlflow_enabled():
        return JsonLinesTracker(folder)
    return DurableTracker(folder, uri=uri, experiment=experiment, name=folder.name, tags=tags)


def first_line(error: Exception) -> str:
    """Return the message of an error in one line of at most 160 characters."""
    text = hide_passwords(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
