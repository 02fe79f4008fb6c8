"""Snapshots in object storage: another server continues the clip."""

from contextlib import closing

import pytest

from tests.helpers.flash_beep import DecodedClip, flash_beep_talker
from tests.helpers.object_store import BUCKET, s3_server
from workflows.serving.client import ClipFile, LiveClient
from workflows.serving.server import ServerOptions, background_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_a_snapshot_in_s3_continues_on_another_server(tmp_path):
    pytest.importorskip("moto")
    talker = flash_beep_talker(tmp_path)
    clip = ClipFile(tmp_path / "clip.mp4")
    with s3_server(tmp_path / "log"):
        options = ServerOptions(port=0, snapshots=f"s3://{BUCKET}/live")
        with background_server(talker, options) as first, closing(LiveClient(first.url, {"seed": 1})) as client:
            for fragment in client.fragments():
                clip.append(fragment)
                client.acknowledge(fragment)
                first.should_exit = first.should_exit or fragment.chunk == 4
        assert (client.done["reason"], client.close_code) == ("shutdown", 1012)
        start = {"resume": client.done["resume"], "received": clip.chunks, "seconds": 8}
        with background_server(talker, options) as second, closing(LiveClient(second.url, start)) as client:
            clip.cut(client.facts["first_chunk"])
            client.play_to(client.facts["start_seconds"])
            for fragment in client.fragments():
                clip.append(fragment)
                client.acknowledge(fragment)
    clip.close()
    DecodedClip((tmp_path / "clip.mp4").read_bytes()).assert_in_sync(8)
