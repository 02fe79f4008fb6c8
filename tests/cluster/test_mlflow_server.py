"""The MLflow server of cluster/mlflow with Postgres and an S3 server, under concurrent writers."""

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

import fsspec
import psutil
import pytest

from tests.helpers.object_store import s3_server

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a-secret-password-51b7"
SERVE = """
mount -t tmpfs none /run && mkdir /run/secrets && mount --bind {secrets} /run/secrets
exec bash {script}
"""
BATCHES, METRICS = 25, 20
WRITER = f"""
import sys, time
import mlflow
from mlflow.entities import Metric
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
run = client.create_run(sys.argv[2], run_name=sys.argv[3])
began = time.time()
for step in range({BATCHES}):
    client.log_batch(run.info.run_id, metrics=[Metric(f"m{{i}}", step + i / 100, 0, step) for i in range({METRICS})])
print(began, time.time())
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
def postgres() -> Iterator[int]:
    """Start a Postgres server as the user postgres (it rejects root); yield its port."""
    programs = postgres_programs()
    if programs is None or os.geteuid() != 0 or not shutil.which("runuser") or not shutil.which("unshare"):
        pytest.skip("needs root and the distribution's package: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed: pip install '.[server]'")
    folder, port = tempfile.mkdtemp(prefix="mfctl-pg-"), free_port()
    Path(folder, "password").write_text(SECRET)
    for path in (folder, f"{folder}/password"):
        shutil.chown(path, "postgres")
    user = ["runuser", "-u", "postgres", "--"]
    make = [programs / "initdb", "-D", f"{folder}/d", "-U", "mlflow", "-A", "scram-sha-256"]
    subprocess.run([*user, *make, "--pwfile", f"{folder}/password"], check=True, capture_output=True)
    server = subprocess.Popen(
        [*user, programs / "postgres", "-D", f"{folder}/d", "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ask = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        with_password = os.environ | {"PGPASSWORD": SECRET}
        while subprocess.run(ask, env=with_password, capture_output=True, check=False).returncode:
            assert server.poll() is None
            time.sleep(0.3)
        yield port
    finally:
        stop = [*user, programs / "pg_ctl", "-D", f"{folder}/d", "stop", "-m", "fast"]
        subprocess.run(stop, check=False, capture_output=True)
        server.wait()
        shutil.rmtree(folder)


@pytest.fixture
def server(postgres: int, tmp_path: Path) -> Iterator[str]:
    """Run the script of the server as its image does; yield its URL. Passwords come from files."""
    port = free_port()
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in ("postgres", "s3"):
        (secrets / name).write_text(SECRET)
    script = SERVE.format(secrets=secrets, script=ROOT / "cluster" / "mlflow" / "serve.sh")
    with s3_server(tmp_path / "s3.log") as _, (tmp_path / "log").open("wb") as log:
        settings = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
        settings |= {"PORT": str(port), "ARTIFACTS": "s3://mlflow", "AWS_ACCESS_KEY_ID": "mlflow"}
        settings["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {name: value for name, value in os.environ.items() if name != "AWS_SECRET_ACCESS_KEY"} | settings
        words = ["unshare", "--mount", "bash", "-euc", script]
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        try:
            uri = f"http://127.0.0.1:{port}"
            wait(f"{uri}/health", process, tmp_path / "log")
            yield uri
            every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            shown = " ".join(word for one in every for word in one.cmdline())
            assert "mlflow" in shown and SECRET not in shown + (tmp_path / "log").read_text()
        finally:
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    one.terminate()
            process.wait()


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_several_writers_at_once_lose_nothing(server: str) -> None:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=server)
    for writers in (1, 4, 8):
        experiment = client.create_experiment(f"{writers} writers")
        seconds = write_at_once(server, experiment, writers)
        runs = client.search_runs([experiment])
        assert len(runs) == writers
        for run in runs:
            for name in ("m0", f"m{METRICS - 1}"):
                steps = [m.step for m in client.get_metric_history(run.info.run_id, name)]
                assert sorted(steps) == list(range(BATCHES))
        rate = writers * BATCHES / seconds
        print(f"{writers} writers: {rate:.0f} requests/s, {rate * METRICS:.0f} metrics/s")
    client.log_text(runs[0].info.run_id, "kept", "note.txt")
    assert [fsspec.filesystem("s3").cat(path) for path in fsspec.filesystem("s3").glob("mlflow/**/note.txt")] == [
        b"kept"
    ]


def write_at_once(uri: str, experiment: str, writers: int) -> float:
    """Return the seconds from the first write of all writers to the last one."""
    words = [sys.executable, "-c", WRITER, uri, experiment]
    started = [
        subprocess.Popen([*words, f"w{i}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for i in range(writers)
    ]
    outputs = [writer.communicate()[0] for writer in started]
    assert [writer.returncode for writer in started] == [0] * writers
    times = [[float(word) for word in text.splitlines()[0].split()] for text in outputs]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def wait(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
