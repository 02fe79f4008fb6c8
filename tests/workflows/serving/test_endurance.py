"""Long sessions, slow clients and many faults, with the stand-in that flashes and beeps: faster than real time."""

import random
import time
from contextlib import closing
from urllib.parse import urlsplit

import psutil
import pytest

from tests.helpers.flash_beep import DecodedClip, flash_beep_talker
from tests.helpers.object_store import FaultProxy
from workflows.serving import realtime
from workflows.serving.client import LiveClient, write_live_clip
from workflows.serving.engine import EngineLimits
from workflows.serving.server import ServerOptions, background_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
MEGABYTE = 1e6


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return flash_beep_talker(tmp_path_factory.mktemp("network"))


def test_sound_and_picture_stay_together_for_ten_minutes(talker, tmp_path):
    with background_server(talker, ServerOptions(port=0, messages_per_second=1e6)) as server:
        write_live_clip(server.url, {"seed": 1}, tmp_path / "clip.mp4", seconds=600)
    clip = DecodedClip((tmp_path / "clip.mp4").read_bytes())
    clip.assert_in_sync(600)
    clip.assert_no_click(1200)


def test_half_an_hour_needs_no_more_memory_than_five_minutes(talker):
    memory = {}
    with (
        background_server(talker, ServerOptions(port=0, messages_per_second=1e6)) as server,
        closing(LiveClient(server.url, {"seed": 1, "seconds": 1800})) as client,
    ):
        for fragment in client.fragments():
            client.acknowledge(fragment)
            client.messages.clear()
            if fragment.chunk in (599, 3599) and not fragment.is_last:
                memory[fragment.chunk] = psutil.Process().memory_info().rss
        assert client.done["seconds"] == 1800
    assert memory[3599] - memory[599] < 16 * MEGABYTE


def test_fifty_lost_connections_lose_nothing(talker, tmp_path):
    draw, faults = random.Random(2), []
    options = ServerOptions(port=0, messages_per_second=1e6, limits=EngineLimits(snapshot_seconds=0.2))
    with background_server(talker, options) as server, FaultProxy(urlsplit(server.url).port, lambda: "") as proxy:

        def on_chunk(chunks: int) -> None:
            if len(faults) < 50 and draw.random() < 0.4:
                faults.append(chunks)
                proxy.reset_all()

        write_live_clip(
            f"http://127.0.0.1:{proxy.port}", {"seed": 1}, tmp_path / "clip.mp4", seconds=100, on_chunk=on_chunk
        )
        assert server.engine.active == 0
    assert len(faults) == 50
    clip = DecodedClip((tmp_path / "clip.mp4").read_bytes())
    clip.assert_in_sync(100)
    clip.assert_no_click(200)


@pytest.mark.parametrize("acknowledges", [False, True])
def test_a_client_that_stops_reading_is_paused_then_closed(talker, monkeypatch, acknowledges):
    """Without acknowledgments the session waits and becomes idle; with them its fragments fill the connection."""
    monkeypatch.setattr(realtime, "_SLOW_CLIENT_S", 1.0)
    limits = EngineLimits(idle_seconds=600.0 if acknowledges else 1.0)
    with background_server(talker, ServerOptions(port=0, messages_per_second=1e6, limits=limits)) as server:
        client = LiveClient(server.url, {"seed": 1})
        made, begin = [], time.monotonic()
        while server.engine.active or not made:
            if acknowledges:
                client.play_to(1e6)
            made.append(server.engine.metrics.rows._sum.get())
            time.sleep(0.005 if acknowledges else 0.05)
            assert time.monotonic() - begin < 120, "the session was not closed"
        list(client.fragments())
        if acknowledges:
            assert made[-1] == made[-20], "the session was not paused before its end"
        else:
            assert made[-1] == 2
            assert (client.done["reason"], client.close_code) == ("idle", 4000)
        client.close()
