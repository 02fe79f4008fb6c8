"""Exported folders: the same network and clips, model card, refusal of wrong folders, upload to a stand-in hub."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mfcore.errors import UserInputError
from tests.helpers.packaged_talker import english_export
from tests.helpers.random_exports import random_export
from workflows.checkpoints.export import HubContent, build_card, export_checkpoint, write_hub_folder
from workflows.checkpoints.load import find_export, load_export, load_metadata, load_weights, locate_export
from workflows.checkpoints.store import file_digest
from workflows.cli.app import app
from workflows.evaluation.sweep import identify_checkpoint

LIMIT = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return english_export(tmp_path_factory.mktemp("run"))


@pytest.fixture
def exported(source: Path, tmp_path: Path) -> Path:
    export_checkpoint(source, tmp_path / "talker")
    return tmp_path / "talker"


def write_sweep(folder: Path, export: Path) -> Path:
    """Write the files of a sweep with rows of ``export`` and of another network."""
    (folder / "rows").mkdir(parents=True)
    (folder / "frontier.png").write_bytes(b"picture")
    row: dict[str, Any] = {"window": "all", "seed": 0, "clips": 3, "checkpoint": "runs/x", "label": "x", "detail": {}}
    own = [row | {"mode": "few", "steps": n, "nfe": n, "metrics": {"sync": 0.1 * n, "entropy": 1.0}} for n in (1, 4, 8)]
    other = row | {"mode": "few", "steps": 4, "nfe": 4, "label": "y", "checkpoint": "runs/y", "metrics": {"sync": 9.0}}
    real = row | {"mode": "real", "steps": 0, "nfe": 0, "label": "real", "metrics": {"sync": 0.95}}
    (folder / "results.json").write_text(json.dumps([real, *own, other]))
    digest = file_digest(export / "ema.safetensors")[:16]
    for i, (found, name) in enumerate(((own[0], digest), (other, "0" * 16), (real, "real"))):
        (folder / "rows" / f"{i}.json").write_text(json.dumps({"digest": name, "rows": [found]}))
    return folder


def test_the_folder_is_the_same_network(source: Path, exported: Path) -> None:
    before, after = load_export(source), load_export(exported)
    assert after[1] == before[1]
    assert all(torch.equal(w, before[0].state_dict()[name]) for name, w in after[0].state_dict().items())
    assert locate_export(exported) == str(exported)
    assert identify_checkpoint(str(exported)).label == "talker"
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "mutual-forcing"
    assert set(config["files"]) == {f.name for f in exported.iterdir()} - {"config.json"}


def test_large_weights_are_shards_with_an_index(source: Path, tmp_path: Path) -> None:
    metadata, weights = load_metadata(source), load_weights(source)
    total = sum(w.nbytes for w in weights.values())
    card = build_card(source, metadata, {}, name="big", parameters=1)
    content = HubContent(metadata=metadata, weights=weights, card=card)
    write_hub_folder(tmp_path / "big", content, shard_bytes=total // 3)
    index = json.loads((tmp_path / "big" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == weights.keys()
    assert len(set(index["weight_map"].values())) >= 3
    assert all(torch.equal(w, weights[name]) for name, w in load_weights(tmp_path / "big").items())
    (tmp_path / "big" / sorted(set(index["weight_map"].values()))[1]).unlink()
    with pytest.raises(UserInputError, match=r"has no model-00002-of.*download the whole folder again"):
        load_weights(tmp_path / "big")


def test_the_card_has_licence_metrics_table_and_plot_of_the_sweep(source: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", source)
    export_checkpoint(source, tmp_path / "talker", sweep=sweep, license="MIT", card={"summary": "It talks"})
    text = (tmp_path / "talker" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert (header["license"], header["language"], header["library_name"]) == ("mit", "en", "mutual-forcing")
    assert header["model-index"][0]["results"][0]["metrics"] == [{"type": "sync", "value": 0.4}]
    assert all(part in text for part in ("It talks", "| few | 8 | 8 | 0.8 |", "| `sync` | 0.4 |", "(frontier.png)"))
    assert "9" not in text.split("NFE per chunk")[1].split("##")[0]  # of another network
    assert (tmp_path / "talker" / "frontier.png").read_bytes() == b"picture"
    export_checkpoint(tmp_path / "talker", tmp_path / "copy")  # an exported folder is a checkpoint
    assert "![Quality" in (tmp_path / "copy" / "README.md").read_text()


def test_a_sweep_of_another_network_is_refused(source: Path, tmp_path: Path) -> None:
    other = random_export(tmp_path / "other", "video")
    sweep = write_sweep(tmp_path / "sweep", other)
    with pytest.raises(UserInputError, match=r"no results of the weights of .*only of runs/x, runs/y"):
        export_checkpoint(source, tmp_path / "talker", sweep=sweep)
    assert not (tmp_path / "talker").exists()


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("model.safetensors", "model.safetensors cannot be read"),
        ("preprocessor_config.json", "preprocessor_config.json is damaged or missing"),
        ("config.json", "config.json is damaged"),
    ],
)
def test_a_damaged_folder_is_reported_with_the_remedy(exported: Path, victim: str, message: str) -> None:
    content = (exported / victim).read_bytes()
    (exported / victim).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserInputError, match=f"{message}.*again"):
        load_export(exported)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "neither a run, a checkpoint nor an export.*mfctl export"),
        ('{"model_type": "llama"}', r"model of another library \(llama\).*mfctl export"),
        ("[]", "contains no object"),
        ('{"model_type": "mutual-forcing", "format_version": 9}', "format version 9.*Update"),
        ('{"model_type": "mutual-forcing", "format_version": 1, "files": {"../x": {}}}', "`files` is missing or wrong"),
    ],
)
def test_empty_and_foreign_folders_are_refused(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserInputError, match=message):
        load_export(tmp_path)


def test_nothing_is_overwritten_or_half_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="not empty. Choose a new folder"):
        export_checkpoint(source, tmp_path / "mine")
    monkeypatch.setattr("workflows.checkpoints.export.render_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_checkpoint(source, tmp_path / "talker")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_flipped_byte_is_found(exported: Path) -> None:
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (exported / "model.safetensors").write_bytes(content)
    with pytest.raises(UserInputError, match="its size or sha256 differs from config.json. Copy or download"):
        load_weights(exported)


def test_raw_weights_are_exported_on_request_only(exported: Path) -> None:
    with pytest.raises(UserInputError, match="has no raw weights: use the checkpoint"):
        load_weights(exported, "raw")


def test_the_folder_of_a_checkpoint_is_found_by_the_command(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "out"), "--json"])
    assert json.loads(result.stdout)["stage"] == "mutual"
    assert find_export(tmp_path / "out") == tmp_path / "out"


class HubStandIn(BaseHTTPRequestHandler):
    """The few requests of an upload; ``token`` is the accepted one."""

    uploads: list[str]
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.headers.get("authorization") != "Bearer good":
            self._reply(401, {"error": "Invalid credentials"})
        else:
            self._reply(200, {"name": "me", "type": "user", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        self.requests.append(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/api/repos/create":
            self._reply(200, {"url": "https://huggingface.co/me/talker", "name": "me/talker"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.uploads.extend(f["path"] for f in files)
            self._reply(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            self._reply(
                200, {"commitUrl": "https://huggingface.co/me/talker/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
            )
        else:
            self._reply(200, {"message": "", "errors": [], "warnings": []})

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubStandIn]]:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    handler = type("Handler", (HubStandIn,), {"uploads": [], "requests": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read at import, maybe in another test
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@LIMIT
def test_push_uploads_every_file(source: Path, tmp_path: Path, hub: type[HubStandIn]) -> None:
    words = ["export", str(source), str(tmp_path / "talker"), "--push", "me/talker", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert set(hub.uploads) == {file.name for file in (tmp_path / "talker").iterdir()}
    assert "me/talker" in json.loads(result.stdout)["url"]


@LIMIT
def test_without_a_token_nothing_is_written(
    source: Path, tmp_path: Path, hub: type[HubStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "talker"), "--push", "me/talker"])
    assert (result.exit_code, hub.requests, (tmp_path / "talker").exists()) == (2, [], False)
    assert "no token of the hub. Set HF_TOKEN" in result.stderr
    monkeypatch.undo()


@LIMIT
@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"HF_TOKEN": "bad"}, 2, "does not accept the token"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "Nothing was written. Check HF_ENDPOINT"),
    ],
)
def test_a_hub_that_refuses_is_reported(
    source: Path,
    tmp_path: Path,
    hub: type[HubStandIn],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    code: int,
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "talker"), "--push", "me/talker"])
    assert (result.exit_code, (tmp_path / "talker").exists()) == (code, False)
    assert message in result.stderr


def test_a_moved_folder_is_the_same_checkpoint(exported: Path, tmp_path: Path) -> None:
    shutil.move(exported, tmp_path / "elsewhere")
    assert identify_checkpoint(str(tmp_path / "elsewhere")).stage == "mutual"
