"""An MLflow server on the distribution's Postgres, to which several processes write at once."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

WRITERS, BATCHES, METRICS = 4, 25, 20
WRITER = f"""
import sys, time
import mlflow
from mlflow.entities import Metric
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
run = client.create_run(sys.argv[2], run_name=sys.argv[3])
for step in range({BATCHES}):
    client.log_batch(run.info.run_id, metrics=[Metric(f"m{{i}}", step + i / 100, 0, step) for i in range({METRICS})])
client.set_terminated(run.info.run_id)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture
def postgres() -> Iterator[str]:
    """A database server of its own, as the distribution's user (it refuses root); its address."""
    programs = postgres_programs()
    if programs is None or os.geteuid() != 0 or not shutil.which("runuser"):
        pytest.skip("needs root and the distribution's package: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed: pip install '.[server]'")
    folder, port = tempfile.mkdtemp(prefix="mfctl-pg-"), free_port()
    shutil.chown(folder, "postgres")
    user = ["runuser", "-u", "postgres", "--"]
    subprocess.run([*user, programs / "initdb", "-D", f"{folder}/d", "-A", "trust"], check=True, capture_output=True)
    server = subprocess.Popen(
        [*user, programs / "postgres", "-D", f"{folder}/d", "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ask = [programs / "psql", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-c", "create database mlflow"]
        while subprocess.run(ask, capture_output=True, check=False).returncode:
            assert server.poll() is None
            time.sleep(0.3)
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/mlflow"
    finally:
        stop = [*user, programs / "pg_ctl", "-D", f"{folder}/d", "stop", "-m", "fast"]
        subprocess.run(stop, check=False, capture_output=True)
        server.wait()
        shutil.rmtree(folder)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_several_writers_at_once_lose_nothing(postgres: str, tmp_path: Path) -> None:
    port = free_port()
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    words += ["--backend-store-uri", postgres, "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait(f"{uri}/health", server, tmp_path / "log")
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.create_experiment("writers")
        started = time.monotonic()
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, uri, experiment, f"w{i}"]) for i in range(WRITERS)]
        assert [writer.wait() for writer in writers] == [0] * WRITERS
        seconds = time.monotonic() - started
        runs = client.search_runs([experiment])
        assert len(runs) == WRITERS
        for run in runs:
            for name in ("m0", f"m{METRICS - 1}"):
                steps = [m.step for m in client.get_metric_history(run.info.run_id, name)]
                assert sorted(steps) == list(range(BATCHES))
        total = WRITERS * BATCHES * METRICS
        print(f"{total} metrics in {WRITERS * BATCHES} requests, {seconds:.1f} s with the writers' start")
    finally:
        if server.poll() is None:
            for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
                process.terminate()
        server.wait()


def wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
