"""The live server through real sockets: streams, events, limits, snapshots, wrong input."""

import base64
import json
import random
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import requests
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mfcore.errors import UserInputError
from preprocessing.media.live_muxer import GENERATED
from tests.helpers.flash_beep import DecodedClip, flash_beep_talker
from workflows.inference.generate import ClipPrompt
from workflows.serving.client import ClipFile, LiveClient, ServerRefusedError, socket_url, write_live_clip
from workflows.serving.engine import EngineLimits
from workflows.serving.remote import generate_remotely
from workflows.serving.server import RunningServer, ServerOptions, background_server

pytestmark = pytest.mark.timeout(60)
START = {"seed": 1, "format": "m4s"}


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return flash_beep_talker(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def server(talker) -> Iterator[RunningServer]:
    options = ServerOptions(port=0, limits=EngineLimits(sessions=3))
    with background_server(talker, options) as running:
        yield running


def receive(client: LiveClient, chunks: int, *, acknowledge: bool = True) -> list:
    """Return the next chunks, acknowledged at once."""
    found = []
    for fragment in client.fragments():
        found.append(fragment)
        if acknowledge:
            client.acknowledge(fragment)
        if len(found) == chunks:
            break
    return found


def finish(client: LiveClient) -> list:
    """Stop the session and return the remaining fragments."""
    client.send("session.stop")
    return list(client.fragments())


def decoded(fragments: list) -> DecodedClip:
    return DecodedClip(b"".join(f.data for f in fragments))


def test_flash_and_beep_stay_together(server):
    with closing(LiveClient(server.url, START)) as client:
        parts = receive(client, 24)
        parts += finish(client)
    assert client.done["reason"] == "stopped"
    assert client.close_code == 1000
    assert parts[-1].is_last
    chunks = parts[-1].chunk + 1
    clip = decoded(parts)
    clip.assert_in_sync(chunks / 2)
    clip.assert_no_click(chunks)
    assert clip.comment == GENERATED
    assert [f.metadata["start_seconds"] for f in parts[:-1]] == [k / 2 for k in range(chunks)]
    assert [f.metadata["num_frames"] for f in parts[:3]] == [13, 12, 12]


def test_the_server_stays_two_chunks_ahead(server):
    with closing(LiveClient(server.url, START)) as client:
        receive(client, 2, acknowledge=False)
        client._socket.recv(timeout=5)  # metrics of the second chunk
        with pytest.raises(TimeoutError):
            client._socket.recv(timeout=0.3)
        client.send("session.ack", played_to=0.6)
        assert [f.chunk for f in receive(client, 2, acknowledge=False)] == [2, 3]


def test_typed_words_are_spoken_where_the_server_announces_them(server):
    with closing(LiveClient(server.url, START)) as client:
        parts = receive(client, 4)
        client.send("session.interaction", event_id="one", event={"transcript": "hello there"})
        client.send("session.interaction", event_id="two", event={"transcript": "again"})
        parts += receive(client, 12)
        parts += finish(client)
    queued = {m["event_id"]: m["applies_at_seconds"] for m in client.messages if m["type"].endswith("queued")}
    clip = decoded(parts)
    spoken = clip.spoken
    assert abs(spoken[0] - queued["one"]) < 1 / 12  # a frame may be white
    assert queued["one"] >= 2.0 + 0.1
    assert queued["two"] > queued["one"] + 0.3
    assert abs(spoken[np.diff(spoken, prepend=0) > 0.2][-1] - queued["two"]) < 1 / 12
    started = {i: f.chunk for f in parts for i in f.metadata["started_event_ids"]}
    assert started == {name: int(at / 0.5) for name, at in queued.items()}
    assert {i for f in parts for i in f.metadata["completed_event_ids"]} == {"one", "two"}


def test_a_session_without_text_is_silent_and_a_transcript_at_the_start_is_spoken(server):
    with closing(LiveClient(server.url, START)) as client:
        assert len(decoded(receive(client, 4) + finish(client)).spoken) == 0
    with closing(LiveClient(server.url, START | {"transcript": "hello"})) as client:
        assert decoded(receive(client, 4) + finish(client)).spoken[0] == pytest.approx(0.1, abs=1 / 24)


def test_caption_and_voice_apply_at_the_next_chunk(server):
    with closing(LiveClient(server.url, START)) as client:
        receive(client, 2)
        client.send("session.interaction", event_id="c", event={"prompt": "a red face"}, transition_chunks=2)
        client.send("session.interaction", event_id="v", event={"voice": {"seed": 1}})
        parts = receive(client, 8)
    assert {i for f in parts for i in f.metadata["started_event_ids"]} == {"c", "v"}
    assert sum("c" in f.metadata["active_event_ids"] for f in parts) == 2


def test_a_full_server_refuses_with_capacity_and_retry_time(server):
    clients = [LiveClient(server.url, START) for _ in range(3)]
    for client in clients:
        receive(client, 1)
    try:
        with pytest.raises(ServerRefusedError) as refused:
            LiveClient(server.url, START)
        assert refused.value.code == "full"
        answer = requests.post(f"{server.url}v1/sessions", json={}, timeout=10)
        assert answer.status_code == 503
        assert answer.json()["error"] | {"message": ""} == {
            "code": "full",
            "message": "",
            "capacity": 3,
            "active": 3,
            "retry_after": 5.0,
        }
        assert int(answer.headers["Retry-After"]) == 5
    finally:
        for client in clients:
            finish(client)
            client.close()


def test_a_lost_client_gets_the_chunks_that_it_missed(server, tmp_path):
    clip = ClipFile(tmp_path / "clip.mp4")
    start = START
    draw = random.Random(0)
    for _ in range(5):
        with closing(LiveClient(server.url, start)) as client:
            clip.cut(client.facts["first_chunk"])
            for fragment in receive(client, draw.randint(1, 5)):
                clip.append(fragment)
        start = {"resume": client.facts["resume"], "received": clip.chunks}
        wait_until_empty(server)
    with closing(LiveClient(server.url, start)) as client:
        for fragment in receive(client, 3) + finish(client):
            clip.append(fragment)
    clip.close()
    DecodedClip((tmp_path / "clip.mp4").read_bytes()).assert_in_sync(clip.chunks / 2)


def wait_until_empty(server: RunningServer) -> None:
    for _ in range(200):
        if server.engine.active == 0:
            return
        time.sleep(0.02)
    raise AssertionError("the session did not end")


def test_a_snapshot_continues_on_another_server(talker, tmp_path):
    options = ServerOptions(port=0, snapshots=str(tmp_path / "snapshots"))
    clip = ClipFile(tmp_path / "clip.mp4")
    with background_server(talker, options) as first, closing(LiveClient(first.url, START)) as client:
        for fragment in receive(client, 5):
            clip.append(fragment)
        client.send("session.snapshot")
        for fragment in receive(client, 4):
            clip.append(fragment)
    (key,) = [m["resume"] for m in client.messages if m["type"] == "session.snapshot"]
    with background_server(talker, options) as second, closing(LiveClient(second.url, {"resume": key})) as client:
        clip.cut(client.facts["first_chunk"])
        for fragment in receive(client, 6) + finish(client):
            clip.append(fragment)
    clip.close()
    data = (tmp_path / "clip.mp4").read_bytes()
    DecodedClip(data).assert_in_sync(clip.chunks / 2)
    DecodedClip(data).assert_no_click(clip.chunks)


def test_a_stopping_server_sends_the_key_and_closes_with_1012(talker):
    with background_server(talker, ServerOptions(port=0)) as running:
        client = LiveClient(running.url, START)
        receive(client, 3)
        running.should_exit = True
        list(client.fragments())
    assert client.done["reason"] == "shutdown"
    assert client.done["resume"] == client.facts["resume"]
    assert client.close_code == 1012


def test_an_idle_session_ends_with_a_snapshot(talker):
    options = ServerOptions(port=0, limits=EngineLimits(idle_seconds=0.3))
    with background_server(talker, options) as running, closing(LiveClient(running.url, START)) as client:
        receive(client, 2)
        list(client.fragments())
    assert (client.done["reason"], client.close_code) == ("idle", 4000)
    assert client.done["resume"]


def test_a_failed_pass_ends_its_session_and_no_other(talker, server):
    talker.fails_at = 6
    try:
        with closing(LiveClient(server.url, START)) as client:
            list(receive(client, 20))
        assert (client.done["reason"], client.close_code) == ("failed", 1011)
    finally:
        talker.fails_at = None
    with closing(LiveClient(server.url, START)) as client:
        assert len(receive(client, 8)) == 8


WRONG = [
    "",
    "{",
    "[]",
    "null",
    '{"type": 5}',
    '{"type": "session.fly"}',
    '{"type": "session.ack"}',
    '{"type": "session.ack", "played_to": NaN}',
    '{"type": "session.ack", "played_to": "soon"}',
    '{"type": "session.interaction", "event_id": "x", "event": {}}',
    '{"type": "session.interaction", "event_id": "x", "event": {"prompt": "a", "transcript": "b"}}',
    '{"type": "session.interaction", "event_id": "", "event": {"prompt": "a"}}',
    '{"type": "session.interaction", "event_id": "x", "event": {"transcript": "..."}}',
    '{"type": "session.interaction", "event_id": "x", "event": {"voice": {"data": "AAAA"}}}',
    '{"type": "session.start"}',
    "[" * 20_000,
    json.dumps({"type": "session.interaction", "event_id": "x", "event": {"prompt": "a" * 17_000}}),
    json.dumps({"type": "session.interaction", "event_id": "x", "event": {"prompt": "a" * 2001}}),
    b"\x00\xff",
]


def test_each_wrong_message_gets_one_error_and_the_session_continues(server):
    with closing(LiveClient(server.url, START)) as client:
        receive(client, 1)
        for wrong in WRONG:
            client._socket.send(wrong)
        client.send("session.ping")
        receive(client, 5)
        assert [f.is_last for f in finish(client)].count(True) == 1
    kinds = [m["type"] for m in client.messages]
    assert kinds.count("error") == len(WRONG)
    assert kinds.index("session.pong") > len(WRONG)
    assert client.done["reason"] == "stopped"
    assert {m.get("event_id") for m in client.messages if m["type"] == "error"} == {None, "x"}


def test_a_thousand_random_messages_do_not_end_the_session(talker):
    draw = random.Random(1)
    valid = json.dumps({"type": "session.interaction", "event_id": "x", "event": {"transcript": "hi"}})
    with background_server(talker, ServerOptions(port=0, messages_per_second=1e6)) as server:
        with closing(LiveClient(server.url, START)) as client:
            receive(client, 1)
            for _ in range(1000):
                text = list(draw.choice([valid, '{"type": "session.ack", "played_to": 1}', '{"a": [1, {}]}']))
                for _ in range(draw.randint(1, 8)):
                    text[draw.randrange(len(text))] = chr(draw.choice([0, 34, 44, 91, 93, 123, 125, 0x1F600, 0x41]))
                client._socket.send("".join(text))
            receive(client, 4)
            finish(client)
        assert client.done["reason"] == "stopped"
    assert 900 < sum(m["type"] == "error" for m in client.messages) <= 1000


def test_too_many_messages_are_refused_and_the_session_continues(server):
    with closing(LiveClient(server.url, START)) as client:
        for _ in range(50):
            client.send("session.ping")
        receive(client, 4)
        finish(client)
    assert "rate_limited" in [m.get("code") for m in client.messages]
    assert sum(m["type"] == "session.pong" for m in client.messages) >= 30


def test_wrong_starts_are_refused_with_the_reason(server):
    for start, code in (
        ({"resume": "0" * 32}, "unknown_snapshot"),
        ({"resume": "../../etc/passwd"}, "unknown_snapshot"),
        ({"session_id": "none"}, "unknown_session"),
        ({"face": "aGVsbG8="}, "bad_face"),
        ({"voice": "aGVsbG8="}, "bad_voice"),
        ({"transcript": "a" * 2001}, "too_large"),
        ({"seed": -1}, "bad_message"),
        ({"format": "webm"}, "bad_message"),
    ):
        with pytest.raises(ServerRefusedError) as refused:
            LiveClient(server.url, start)
        assert refused.value.code == code, start
    with connect(socket_url(server.url)) as socket:
        socket.send('{"type": "session.ack", "played_to": 0}')
        assert json.loads(socket.recv(timeout=5))["code"] == "bad_message"


def test_an_uploaded_face_and_voice_start_a_session(server):
    files = {name: requests.get(f"{server.url}v1/{name}s?seed=3", timeout=10).content for name in ("face", "voice")}
    with closing(LiveClient(server.url, {n: base64.b64encode(d).decode() for n, d in files.items()})) as client:
        receive(client, 1)


def test_pages_of_other_hosts_are_refused(server):
    with pytest.raises(InvalidStatus) as refused:
        connect(socket_url(server.url), origin="http://evil.example").__enter__()
    assert refused.value.response.status_code == 403
    with connect(socket_url(server.url), origin=server.url.rstrip("/")) as socket:
        assert socket.state.name == "OPEN"
    answer = requests.get(f"{server.url}v1/info", headers={"Origin": "http://evil.example"}, timeout=10)
    assert answer.status_code == 403


def test_a_token_opens_the_server(talker):
    with background_server(talker, ServerOptions(port=0, token="secret")) as running:
        assert requests.get(f"{running.url}v1/info", timeout=10).status_code == 401
        assert requests.get(f"{running.url}healthz", timeout=10).status_code == 200
        assert requests.get(f"{running.url}v1/info?token=secret", timeout=10).status_code == 200
        bearer = {"Authorization": "Bearer secret"}
        assert requests.get(f"{running.url}v1/info", headers=bearer, timeout=10).status_code == 200
        with pytest.raises(Exception, match="token"):
            LiveClient(running.url, START)
        with closing(LiveClient(f"{running.url}?token=secret", START)) as client:
            receive(client, 1)


def test_the_routes_answer(server):
    info = requests.get(f"{server.url}v1/info", timeout=10).json()
    assert (info["model"], info["width"], info["height"], info["fps"]) == ("flash-beep", 32, 32, 24.0)
    assert info["mime"] == 'video/mp4; codecs="avc1.42E01F,mp4a.40.2"'
    face = requests.get(f"{server.url}v1/faces?seed=3", timeout=10)
    assert face.content.startswith(b"\x89PNG")
    assert "face" in face.headers["X-Caption"]
    assert requests.get(f"{server.url}v1/voices?seed=1", timeout=10).content.startswith(b"RIFF")
    assert requests.get(f"{server.url}readyz", timeout=10).json() == {"ready": True}
    assert "mfctl_first_chunk_seconds_bucket" in requests.get(f"{server.url}metrics", timeout=10).text
    assert requests.get(f"{server.url}docs", timeout=10).status_code == 200
    assert "<html" in requests.get(server.url, timeout=10).text
    assert requests.get(f"{server.url}page/../server.py", timeout=10).status_code == 404


def test_a_session_created_over_http_starts_once(server):
    face = requests.get(f"{server.url}v1/faces?seed=3", timeout=10).content
    answer = requests.post(
        f"{server.url}v1/sessions", files={"face": face}, data={"seed": "4", "prompt": "a face"}, timeout=10
    )
    assert answer.status_code == 201, answer.text
    created = answer.json()
    assert created["url"] == f"{socket_url(server.url)}?session_id={created['session_id']}"
    with closing(LiveClient(created["url"], {"session_id": created["session_id"]})) as client:
        assert client.facts["resume"] == created["resume"]
        receive(client, 1)
    with pytest.raises(ServerRefusedError, match="no such session"):
        LiveClient(created["url"], {"session_id": created["session_id"]})
    wrong = requests.post(f"{server.url}v1/sessions", files={"face": b"no picture"}, timeout=10)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_face")
    wrong = requests.post(f"{server.url}v1/sessions", data="{", timeout=10)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_message")


def test_the_client_writes_a_clip(server, tmp_path):
    facts = write_live_clip(server.url, START | {"transcript": "hello"}, tmp_path / "clip.mp4", seconds=3.2)
    assert facts["seconds"] == 3.5
    clip = DecodedClip((tmp_path / "clip.mp4").read_bytes())
    clip.assert_in_sync(3.5)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_generate_uses_a_server(server, tmp_path):
    prompt = ClipPrompt(transcript="hello there", caption="a face")
    facts = generate_remotely(server.url, prompt, out=str(tmp_path / "clip.mp4"))
    clip = DecodedClip((tmp_path / "clip.mp4").read_bytes())
    clip.assert_in_sync(facts["seconds"])
    assert clip.spoken[-1] < facts["seconds"] - 0.3
    with pytest.raises(UserInputError, match="does not accept|no answer"):
        generate_remotely("http://127.0.0.1:1", prompt, out=str(tmp_path / "other.mp4"))
    with pytest.raises(UserInputError, match="exists"):
        generate_remotely(server.url, prompt, out=str(tmp_path / "clip.mp4"))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_finished_clips_are_ordered_and_downloaded(server):
    url = f"{server.url}v1/videos"
    order = requests.post(url, json={"transcript": "hello", "seconds": 2}, timeout=10).json()
    assert (order["object"], order["size"], order["seconds"], order["model"]) == ("video", "32x32", "2", "flash-beep")
    early = requests.get(f"{url}/{order['id']}/content", timeout=10)
    assert early.status_code in (200, 409)
    for _ in range(200):
        order = requests.get(f"{url}/{order['id']}", timeout=10).json()
        if order["status"] == "completed":
            break
        time.sleep(0.05)
    assert (order["status"], order["progress"], order["error"]) == ("completed", 100, None)
    content = requests.get(f"{url}/{order['id']}/content", timeout=10)
    assert content.headers["content-type"] == "video/mp4"
    DecodedClip(content.content).assert_in_sync(2)
    assert requests.get(f"{url}/video_none", timeout=10).status_code == 404
    assert requests.post(url, json={"seconds": 0}, timeout=10).status_code == 422
