"""`mfctl serve` and `mfctl bench serve`, as processes."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from tests.helpers.random_exports import random_export
from workflows.serving.client import LiveClient

MFCTL = [sys.executable, "-m", "workflows.cli"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*MFCTL, *arguments], capture_output=True, text=True, timeout=100, check=False, env=ONE_THREAD
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "ray",
    [
        pytest.param((), id="one process"),
        pytest.param(("--ray", "--max-replicas", "2"), marks=pytest.mark.cluster, id="Ray Serve"),
    ],
)
def test_serve_prints_its_address_and_sends_the_key_when_it_is_stopped(tmp_path, ray):
    if ray:
        pytest.importorskip("grpc_reflection", reason="Ray Serve is not installed: the extra serve")
    export = random_export(tmp_path, "mutual")
    command = [*MFCTL, "serve", str(export), "--port", "0", "--steps", "1", "--json", *ray]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with closing(LiveClient(url, {"transcript": "hello"})) as client:
                for fragment in client.fragments():
                    client.acknowledge(fragment)
                    if fragment.chunk == 3:
                        process.send_signal(signal.SIGTERM)
            assert (client.done["reason"], client.close_code) == ("shutdown", 1012)
            assert client.done["resume"] == client.facts["resume"]
            assert process.wait(90) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_wrong_options_are_refused_with_one_message(tmp_path):
    for arguments, reason in (
        (["nothing", "--host", "0.0.0.0"], "--token"),
        (["nothing", "--sessions", "0"], "--sessions"),
        (["nothing", "--replicas", "2"], "--ray"),
        (["nothing", "--ray", "--replicas", "2", "--max-replicas", "1"], "--max-replicas"),
        (["nothing", "--ray", "--host", "0.0.0.0"], "--token"),
        ([str(tmp_path / "nothing")], "nothing"),
        ([str(tmp_path / "nothing"), "--ray"], "nothing"),
    ):
        done = run("serve", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), (arguments, done.stderr)
        assert reason in done.stderr
        assert done.stderr.count("error:") == 1


@pytest.mark.slow
def test_bench_serve_measures_sessions(tmp_path):
    export = random_export(tmp_path, "mutual")
    done = run("bench", "serve", str(export), "--sessions", "1,2", "--seconds", "4", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["sessions"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert 0 < row["first_chunk_s"]["p50"] <= row["first_chunk_s"]["p95"]
        assert row["chunk_period_s"]["p50"] > 0
        assert row["chunks"] == 8 * row["sessions"]
        assert row["event_applied_s"] is not None
    assert result["rows"][0]["batching"] is None
    assert result["rows"][1]["batching"]["passes"] > 0
    assert result["session_bytes"] > 1e6
