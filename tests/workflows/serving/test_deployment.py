"""Replicas on Ray Serve, with real Ray processes: lost replicas, sessions and orders that all replicas know."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from mfcore.errors import UserInputError
from tests.helpers.flash_beep import DecodedClip
from tests.helpers.object_store import FaultProxy
from tests.helpers.ray_access import listening_addresses
from workflows.serving.client import LiveClient, write_live_clip

pytest.importorskip("grpc_reflection", reason="Ray Serve is not installed: the extra serve")

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class RunningReplicas:
    """A server of the stand-in with two replicas for two sessions each."""

    process: subprocess.Popen
    url: str
    folder: Path

    @property
    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas that have loaded the network."""
        loaded = {p.name for p in (self.folder / "loaded").iterdir()}
        return [p for p in self.family if str(p.pid) in loaded]

    @property
    def family(self) -> list[psutil.Process]:
        """All processes of the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_maker(self, seed: int) -> None:
        """Kill the replica that made the last chunk of a session."""
        os.kill(int((self.folder / "makers" / str(seed)).read_text()), signal.SIGKILL)

    def wait_for_replicas(self, number: int) -> None:
        """Wait until so many replicas have loaded the network."""
        for _ in range(600):
            if len(self.replicas) >= number:
                return
            time.sleep(0.2)
        raise AssertionError(f"{len(self.replicas)} of {number} replicas run")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RunningReplicas]:
    folder = tmp_path_factory.mktemp("live")
    command = [sys.executable, "-m", "tests.helpers.ray_live", str(folder), "2", "2"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().decode().strip()
            assert url, (folder / "log").read_text()
            yield RunningReplicas(process, url, folder)
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for left in psutil.wait_procs(family, timeout=10)[1]:
                left.kill()


def test_a_clip_continues_on_another_replica_after_one_was_killed(server, tmp_path):
    seed, arrived = 7, []

    def on_chunk(chunks: int) -> None:
        arrived.append(time.monotonic())
        time.sleep(0.1)
        if chunks == 15 and len(arrived) == 15:
            server.kill_maker(seed)

    write_live_clip(server.url, {"seed": seed}, tmp_path / "clip.mp4", seconds=20, on_chunk=on_chunk)
    DecodedClip((tmp_path / "clip.mp4").read_bytes()).assert_in_sync(20)
    assert max(b - a for a, b in zip(arrived, arrived[1:], strict=False)) < 5
    server.wait_for_replicas(2)


def test_sessions_and_orders_are_known_to_every_replica(server):
    made = [requests.post(f"{server.url}v1/sessions", json={"seed": 20 + i}, timeout=30).json() for i in range(6)]
    for session in made:
        with closing(LiveClient(session["url"], {"session_id": session["session_id"], "seconds": 1})) as client:
            assert client.facts["resume"] == session["resume"]
            for fragment in client.fragments():
                client.acknowledge(fragment)
        assert client.done["reason"] == "stopped"
        with pytest.raises(UserInputError, match="no such session"):
            LiveClient(session["url"], {"session_id": session["session_id"]})
    order = requests.post(f"{server.url}v1/videos", json={"seconds": 2}, timeout=30).json()
    statuses = [wait_for_video(server.url, order["id"]) for _ in range(6)]
    assert {status["status"] for status in statuses} == {"completed"}
    for _ in range(6):
        DecodedClip(requests.get(f"{server.url}v1/videos/{order['id']}/content", timeout=30).content).assert_in_sync(2)


def wait_for_video(url: str, name: str) -> dict:
    for _ in range(300):
        status = requests.get(f"{url}v1/videos/{name}", timeout=30).json()
        if status["status"] not in ("queued", "in_progress"):
            return status
        time.sleep(0.1)
    raise AssertionError(status)


def test_other_machines_cannot_reach_the_processes(server):
    assert listening_addresses([p.pid for p in server.family]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert urlsplit(server.url).hostname == "127.0.0.1"


def test_fifty_disconnects_and_replica_kills_lose_no_session(server, tmp_path):
    draw, seed, faults = random.Random(3), 11, []
    kills = {10, 20, 30, 40}
    target = urlsplit(server.url).port
    with FaultProxy(target, lambda: "") as proxy:

        def on_chunk(chunks: int) -> None:
            time.sleep(0.03)
            if len(faults) == 50 or draw.random() > 0.4:
                return
            faults.append(chunks)
            if len(faults) in kills:
                server.wait_for_replicas(2)
                server.kill_maker(seed)
            else:
                proxy.reset_all()

        address = f"http://127.0.0.1:{proxy.port}"
        write_live_clip(address, {"seed": seed}, tmp_path / "clip.mp4", seconds=100, on_chunk=on_chunk)
    assert len(faults) == 50
    clip = DecodedClip((tmp_path / "clip.mp4").read_bytes())
    clip.assert_in_sync(100)
    clip.assert_no_click(200)


def test_sigterm_stores_the_sessions_and_sends_their_keys(server):
    with closing(LiveClient(server.url, {"seed": 30})) as client:
        for fragment in client.fragments():
            client.acknowledge(fragment)
            if fragment.chunk == 3:
                server.process.send_signal(signal.SIGTERM)
    assert (client.done["reason"], client.close_code) == ("shutdown", 1012)
    assert client.done["resume"] == client.facts["resume"]
    assert (server.folder / "snapshots" / f"{client.done['resume']}.safetensors").is_file()
    assert server.process.wait(90) == 0
