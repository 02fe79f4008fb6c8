"""A training's log: on disk in the run's folder at once, in MLflow as soon as MLflow takes it.

A training must not stop, wait or lose a number because a server is away. So ``log`` only appends to JSON lines; a
thread sends them in order, again and again until they arrive, and notes in ``mlflow.json`` how far it came. Memory
stays bounded, since what waits lies in the files, and a killed process leaves everything for the next one. A batch
whose answer was lost is sent again: MLflow tells metrics by name, step, time and value, so it counts once.

    metrics.jsonl, params.json, artifacts.jsonl   the log; complete, with or without a server
    mlflow.json                                   the MLflow run, and what it has got
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

from workflows.tracking.mlflow_tracker import MlflowTracker, mlflow_enabled
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
from workflows.utils.json_io import write_text_atomically

SYNC_STATE_FILE = "mlflow.json"
START_SECONDS = 15.0  # how long a run waits, at its start, for the first word of its server
FLUSH_SECONDS = 30.0  # and at its end, for what is still to be sent
RETRY_BACKOFF_S = (1.0, 60.0)  # seconds between attempts: the first, doubled up to the second
BATCH_LINES = 50  # sent at once
MLFLOW_HTTP_ENV = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has none: we try again ourselves, and can be asked to stop."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncState:
    """``mlflow.json``."""

    uri: str
    key: str  # tag of the run: making it is asked for until it is known
    run: str | None = None  # MLflow's id
    metrics: int = 0  # bytes of metrics.jsonl that are there
    last_step: int = -1
    params: bool = False
    artifacts: int = 0  # bytes of artifacts.jsonl
    status: str | None = None  # what MLflow was told last: None, running


def load_sync_state(folder: Path, uri: str) -> SyncState:
    """What ``uri`` has got of the log in ``folder``: nothing, where it was sent to another server."""
    place = folder / SYNC_STATE_FILE
    facts = json.loads(place.read_text()) if place.exists() else {}
    if facts.get("uri") != uri:
        facts = {}
    known: dict[str, Any] = {f.name: facts[f.name] for f in fields(SyncState) if f.name in facts}
    return replace(SyncState(uri=uri, key=secrets.token_hex(16)), **known)


def save_sync_state(folder: Path, sent: SyncState) -> None:
    write_text_atomically(folder / SYNC_STATE_FILE, json.dumps(asdict(sent), indent=1) + "\n")


class DurableTracker:
    """The tracker of a training: JSON lines first, MLflow behind."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str]
    ) -> None:  # fmt: skip
        for variable, value in MLFLOW_HTTP_ENV.items():
            os.environ.setdefault(variable, value)
        self._folder, self._lines = folder, JsonLinesTracker(folder)
        self._sender = SyncThread(folder, uri=uri, experiment=experiment, name=name, tags=tags)
        self._sender.start()
        self._sender.wait_first_attempt(START_SECONDS)

    @property
    def run_id(self) -> str | None:
        """None until MLflow has answered for the first time."""
        return self._sender.sent.run

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        self._lines.log(step, metrics, late=late)
        self._sender.notify()

    def params(self, values: Mapping[str, Any]) -> None:
        self._lines.params(values)
        self._sender.notify()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._lines.artifact(path, folder)
        self._sender.notify()

    def finish(self, *, failed: bool = False) -> None:
        """Wait a limited time until MLflow has everything; say what it has not got."""
        self._sender.flush("FAILED" if failed else "FINISHED", FLUSH_SECONDS)
        if error := self._sender.error:
            _LOGGER.warning(
                f"MLflow at {self._sender.sent.uri} did not take the whole log ({error}). Nothing is lost: "
                f"{describe_backlog(self._folder, self._sender.sent)} wait in {self._folder}; "
                "the same command sends them when it is back"
            )


class SyncThread(threading.Thread):
    """Sends what is new in a folder's log. One attempt at a time, in order."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str]
    ) -> None:  # fmt: skip
        super().__init__(name="mlflow", daemon=True)
        self.sent = load_sync_state(folder, uri)
        self.error: str | None = None  # of the latest attempt, if it failed
        self._folder, self._experiment, self._name = folder, experiment, name
        self._tags = {**tags, DEDUP_TAG: self.sent.key}
        self._status: str | None = None
        self._client: MlflowTracker | None = None
        self._seen = -1.0
        self._news = threading.Condition()
        self._asked, self._done, self._tried = 1, 0, 0
        self._hurry = self._over = False
        self._keep()  # the key is on disk before it is used

    def notify(self) -> None:
        with self._news:
            self._asked += 1
            self._news.notify_all()

    def wait_first_attempt(self, limit: float) -> None:
        """Until the first attempt has ended, well or not."""
        with self._news:
            self._news.wait_for(lambda: self._tried > 0, limit)

    def flush(self, status: str, limit: float) -> None:
        """Send what is left, and the status; no more attempts after ``limit`` seconds."""
        with self._news:
            self._status, self._hurry = status, True
            self._asked += 1
            self._news.notify_all()
            if not self._news.wait_for(lambda: self._done == self._asked, limit) and self.error is None:
                self.error = f"no answer within {limit:.0f} s"
            self._over = True
            self._news.notify_all()

    def run(self) -> None:
        wait = RETRY_BACKOFF_S[0]
        while True:
            with self._news:
                self._news.wait_for(lambda: self._asked > self._done or self._over)
                if self._over:
                    return
                asked = self._asked
            try:
                self._send()
            except Exception as error:  # of a network, a server, a store: whatever it is, the log waits on disk
                self._failed(error)
                with self._news:
                    self._news.wait_for(lambda: self._hurry, wait)
                    if self._hurry and not self._over:
                        self._news.wait_for(lambda: self._over, RETRY_BACKOFF_S[0])
                wait = min(2 * wait, RETRY_BACKOFF_S[1])
            else:
                self._succeeded(asked)
                wait = RETRY_BACKOFF_S[0]

    def _failed(self, error: Exception) -> None:
        self._client = None
        with self._news:
            fresh, self.error = self.error is None, first_line(error)
            self._tried += 1
            self._news.notify_all()
        if fresh and not self._over:
            _LOGGER.warning(
                f"MLflow at {self.sent.uri} does not answer ({self.error}). Training goes on; "
                f"the log is kept in {self._folder} and sent when it is back"
            )

    def _succeeded(self, asked: int) -> None:
        with self._news:
            again, self.error = self.error is not None, None
            self._done = asked
            self._tried += 1
            self._news.notify_all()
        if again and not self._over:
            _LOGGER.info(f"MLflow at {self.sent.uri} is back and has the whole log")

    def _send(self) -> None:
        client = self._connected()
        if not self.sent.params and (self._folder / PARAMS).exists():
            client.params(json.loads((self._folder / PARAMS).read_text()))
            self._keep(params=True)
        for entries, end in read_batches(self._folder / METRICS, self.sent.metrics):
            new = drop_repeated_steps(entries, self.sent.last_step)
            client.send([e for e in new if e.get(STEP_KEY, self._seen + 1) > self._seen])
            self._keep(
                metrics=end, last_step=max([self.sent.last_step, *(e["step"] for e in new if LATE_KEY not in e)])
            )
        for entry, end in iter_json_lines(self._folder / ARTIFACTS, self.sent.artifacts):
            self._upload(client, Path(entry["path"]), entry["folder"])
            self._keep(artifacts=end)
        if self._status != self.sent.status:
            client.finish(failed=self._status == "FAILED")
            self._keep(status=self._status)

    def _connected(self) -> MlflowTracker:
        """To the run of the log: made once, whatever was lost on the way; marked as running."""
        if self._client is None:
            sent = self.sent
            self._client = MlflowTracker(
                sent.uri, experiment=self._experiment, name=self._name, run_id=sent.run, tags=self._tags
            )
            self._keep(run=self._client.run_id, status=None)
            self._seen = self._client.samples_seen  # an answer may have been lost, but not what it was about
        return self._client

    def _upload(self, client: MlflowTracker, path: Path, folder: str | None) -> None:
        if path.exists():
            client.artifact(path, folder)
        else:
            _LOGGER.warning(f"{path} is gone and will not be in MLflow")

    def _keep(self, **facts: Any) -> None:
        """Note how far it came, unless the run has gone on without us."""
        self.sent = replace(self.sent, **facts)
        if not self._over:
            save_sync_state(self._folder, self.sent)


def read_batches(path: Path, start: int) -> Iterator[tuple[list[Entry], int]]:
    """Entries from byte ``start`` on, at most ``LINES`` at once, each with the byte behind it."""
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
    """Without steps that came before: a driver that died may have left a worker that still wrote.

    What carries ``STEP`` begins a step; what does not adds to it, what is late to any step that has begun.
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
    """What MLflow has not got, in words."""
    steps = sum(1 for _ in iter_json_lines(folder / METRICS, sent.metrics))
    files = sum(1 for _ in iter_json_lines(folder / ARTIFACTS, sent.artifacts))
    parts = [f"{steps} log entries", f"{files} files", *([] if sent.params else ["the parameters"])]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def has_backlog(folder: Path, uri: str) -> bool:
    """Whether the log of a run that has ended waits for its MLflow server."""
    sent = load_sync_state(folder, uri)
    sizes = {name: (folder / name).stat().st_size for name in (METRICS, ARTIFACTS) if (folder / name).exists()}
    behind = sent.metrics < sizes.get(METRICS, 0) or sent.artifacts < sizes.get(ARTIFACTS, 0)
    return mlflow_enabled() and (behind or sent.status is None)


def open_durable_tracker(
    folder: Path, *, uri: str, experiment: str, tags: Mapping[str, str]
) -> Tracker:  # fmt: skip
    """The log of the training in ``folder``, begun or continued; MLflow calls the run as the folder.

    Without MLflow, or when MFCTL_TRACKER=json asks for it, it stays on disk and can be sent later from there.
    """
    if not mlflow_enabled():
        return JsonLinesTracker(folder)
    return DurableTracker(folder, uri=uri, experiment=experiment, name=folder.name, tags=tags)


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
