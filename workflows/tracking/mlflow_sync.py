"""A training's log: on disk in the run's folder at once, in MLflow as soon as MLflow takes it.

A training must not stop, wait or lose a number because a server is away. So ``log`` only appends to JSON lines; a
thread sends them in order, again and again until they arrive, and notes in ``mlflow.json`` how far it came. Memory
stays bounded, since what waits lies in the files, and a killed process leaves everything for the next one. A batch
whose answer was lost is sent again: MLflow tells metrics by name, step, time and value, so it counts once.

    metrics.jsonl, params.json, artifacts.jsonl   the log; complete, with or without a server
    mlflow.json                                   the MLflow run, and what it has got
"""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from workflows.tracking.mlflow_tracker import Mlflow, mlflow_is_here
from workflows.tracking.tracker import (
    ARTIFACTS,
    LATE,
    METRICS,
    ONCE,
    PARAMS,
    STEP,
    Entry,
    JsonLines,
    Tracker,
    read_places,
)

NOTE = "mlflow.json"
START_SECONDS = 15.0  # how long a run waits, at its start, for the first word of its server
FLUSH_SECONDS = 30.0  # and at its end, for what is still to be sent
WAITS = (1.0, 60.0)  # seconds between attempts: the first, doubled up to the second
LINES = 50  # sent at once
CLIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has none: we try again ourselves, and can be asked to stop."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """``mlflow.json``."""

    uri: str
    key: str  # tag of the run: making it is asked for until it is known
    run: str | None = None  # MLflow's id
    metrics: int = 0  # bytes of metrics.jsonl that are there
    last_step: int = -1
    params: bool = False
    artifacts: int = 0  # bytes of artifacts.jsonl
    status: str | None = None  # what MLflow was told last: None, running


def read_note(folder: Path, uri: str) -> Sent:
    """What ``uri`` has got of the log in ``folder``: nothing, where it was sent to another server."""
    place = folder / NOTE
    facts = json.loads(place.read_text()) if place.exists() else {}
    if facts.get("uri") != uri:
        facts = {}
    known: dict[str, Any] = {f.name: facts[f.name] for f in fields(Sent) if f.name in facts}
    return replace(Sent(uri=uri, key=secrets.token_hex(16)), **known)


def write_note(folder: Path, sent: Sent) -> None:
    temporary = folder / f".tmp-{NOTE}"
    temporary.write_text(json.dumps(asdict(sent), indent=1) + "\n")
    temporary.replace(folder / NOTE)


class Delivered:
    """The tracker of a training: JSON lines first, MLflow behind."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str], say: Say
    ) -> None:  # fmt: skip
        for variable, value in CLIENT.items():
            os.environ.setdefault(variable, value)
        self._folder, self._lines, self._say = folder, JsonLines(folder), say
        self._sender = Sender(folder, uri=uri, experiment=experiment, name=name, tags=tags, say=say)
        self._sender.start()
        self._sender.first_word(START_SECONDS)

    @property
    def run_id(self) -> str | None:
        """None until MLflow has answered for the first time."""
        return self._sender.sent.run

    def log(self, step: int, metrics: Mapping[str, float], *, late: bool = False) -> None:
        self._lines.log(step, metrics, late=late)
        self._sender.wake()

    def params(self, values: Mapping[str, Any]) -> None:
        self._lines.params(values)
        self._sender.wake()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._lines.artifact(path, folder)
        self._sender.wake()

    def finish(self, *, failed: bool = False) -> None:
        """Wait a limited time until MLflow has everything; say what it has not got."""
        self._sender.end("FAILED" if failed else "FINISHED", FLUSH_SECONDS)
        if error := self._sender.error:
            self._say(
                f"MLflow at {self._sender.sent.uri} did not take the whole log ({error}). Nothing is lost: "
                f"{waiting(self._folder, self._sender.sent)} wait in {self._folder}; "
                "the same command sends them when it is back"
            )


class Sender(threading.Thread):
    """Sends what is new in a folder's log. One attempt at a time, in order."""

    def __init__(
        self, folder: Path, *, uri: str, experiment: str, name: str, tags: Mapping[str, str], say: Say
    ) -> None:  # fmt: skip
        super().__init__(name="mlflow", daemon=True)
        self.sent = read_note(folder, uri)
        self.error: str | None = None  # of the latest attempt, if it failed
        self._folder, self._experiment, self._name, self._say = folder, experiment, name, say
        self._tags = {**tags, ONCE: self.sent.key}
        self._status: str | None = None
        self._client: Mlflow | None = None
        self._seen = -1.0
        self._news = threading.Condition()
        self._asked, self._done, self._tried = 1, 0, 0
        self._hurry = self._over = False
        self._keep()  # the key is on disk before it is used

    def wake(self) -> None:
        with self._news:
            self._asked += 1
            self._news.notify_all()

    def first_word(self, limit: float) -> None:
        """Until the first attempt has ended, well or not."""
        with self._news:
            self._news.wait_for(lambda: self._tried > 0, limit)

    def end(self, status: str, limit: float) -> None:
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
        wait = WAITS[0]
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
                        self._news.wait_for(lambda: self._over, WAITS[0])
                wait = min(2 * wait, WAITS[1])
            else:
                self._succeeded(asked)
                wait = WAITS[0]

    def _failed(self, error: Exception) -> None:
        self._client = None
        with self._news:
            fresh, self.error = self.error is None, one_line(error)
            self._tried += 1
            self._news.notify_all()
        if fresh and not self._over:
            self._say(
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
            self._say(f"MLflow at {self.sent.uri} is back and has the whole log")

    def _send(self) -> None:
        client = self._connected()
        if not self.sent.params and (self._folder / PARAMS).exists():
            client.params(json.loads((self._folder / PARAMS).read_text()))
            self._keep(params=True)
        for entries, end in batches(self._folder / METRICS, self.sent.metrics):
            new = in_order(entries, self.sent.last_step)
            client.send([e for e in new if e.get(STEP, self._seen + 1) > self._seen])
            self._keep(metrics=end, last_step=max([self.sent.last_step, *(e["step"] for e in new if LATE not in e)]))
        for entry, end in read_places(self._folder / ARTIFACTS, self.sent.artifacts):
            self._upload(client, Path(entry["path"]), entry["folder"])
            self._keep(artifacts=end)
        if self._status != self.sent.status:
            client.finish(failed=self._status == "FAILED")
            self._keep(status=self._status)

    def _connected(self) -> Mlflow:
        """To the run of the log: made once, whatever was lost on the way; marked as running."""
        if self._client is None:
            sent = self.sent
            self._client = Mlflow(sent.uri, self._experiment, self._name, sent.run, self._tags)
            self._keep(run=self._client.run_id, status=None)
            self._seen = self._client.samples_seen  # an answer may have been lost, but not what it was about
        return self._client

    def _upload(self, client: Mlflow, path: Path, folder: str | None) -> None:
        if path.exists():
            client.artifact(path, folder)
        else:
            self._say(f"{path} is gone and will not be in MLflow")

    def _keep(self, **facts: Any) -> None:
        """Note how far it came, unless the run has gone on without us."""
        self.sent = replace(self.sent, **facts)
        if not self._over:
            write_note(self._folder, self.sent)


def batches(path: Path, start: int) -> Iterator[tuple[list[Entry], int]]:
    """Entries from byte ``start`` on, at most ``LINES`` at once, each with the byte behind it."""
    entries: list[Entry] = []
    end = start
    for entry, end in read_places(path, start):
        entries.append(entry)
        if len(entries) == LINES:
            yield entries, end
            entries = []
    if entries:
        yield entries, end


def in_order(entries: Sequence[Entry], last: int) -> list[Entry]:
    """Without steps that came before: a driver that died may have left a worker that still wrote.

    What carries ``STEP`` begins a step; what does not adds to it, what is late to any step that has begun.
    """
    out: list[Entry] = []
    for entry in entries:
        if LATE in entry:
            out.append(entry)
        elif entry["step"] > last or (entry["step"] == last and STEP not in entry):
            out.append(entry)
            last = entry["step"]
    return out


def waiting(folder: Path, sent: Sent) -> str:
    """What MLflow has not got, in words."""
    steps = sum(1 for _ in read_places(folder / METRICS, sent.metrics))
    files = sum(1 for _ in read_places(folder / ARTIFACTS, sent.artifacts))
    parts = [f"{steps} log entries", f"{files} files", *([] if sent.params else ["the parameters"])]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def unsent(folder: Path, uri: str) -> bool:
    """Whether the log of a run that has ended waits for its MLflow server."""
    sent = read_note(folder, uri)
    sizes = {name: (folder / name).stat().st_size for name in (METRICS, ARTIFACTS) if (folder / name).exists()}
    behind = sent.metrics < sizes.get(METRICS, 0) or sent.artifacts < sizes.get(ARTIFACTS, 0)
    return mlflow_is_here() and (behind or sent.status is None)


def open_training_tracker(
    folder: Path, *, uri: str, experiment: str, tags: Mapping[str, str], say: Say
) -> Tracker:  # fmt: skip
    """The log of the training in ``folder``, begun or continued; MLflow calls the run as the folder.

    Without MLflow, or when MFCTL_TRACKER=json asks for it, it stays on disk and can be sent later from there.
    """
    if not mlflow_is_here():
        return JsonLines(folder)
    return Delivered(folder, uri=uri, experiment=experiment, name=folder.name, tags=tags, say=say)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
