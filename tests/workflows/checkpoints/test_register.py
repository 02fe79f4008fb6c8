"""Registered models: versions, aliases, logged models with metrics and dataset, and a registry that is away."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from tests.helpers.random_exports import random_export
from workflows.checkpoints.load import load_export, load_weights
from workflows.checkpoints.register import register_checkpoint
from workflows.cli.app import app

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(autouse=True)
def tracking(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("MFCTL_TRACKER", raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    export = random_export(folder, "video")
    record = {"data": "/data/faces", "progress": {"samples_seen": 40, "last": {"flow_matching/video": 0.25}}}
    (folder / "run.json").write_text(json.dumps(record))
    return export


def test_an_alias_is_a_checkpoint(checkpoint: Path, store: str, tmp_path: Path) -> None:
    made = register_checkpoint(str(checkpoint), "faces", alias="champion")
    assert (made["version"], made["checkpoint"], made["existed"]) == ("1", "models:/faces@champion", False)
    before = load_export(checkpoint)[0].state_dict()
    for uri in ("models:/faces@champion", "models:/faces/1"):
        assert all(torch.equal(w, before[name]) for name, w in load_weights(uri).items())
    client = mlflow.MlflowClient(store, registry_uri=store)
    model = client.get_logged_model(made["model_id"])
    assert model.params["stage"] == "video"
    assert {(m.key, m.value, m.dataset_name) for m in model.metrics} == {
        ("model/validation/flow_matching/video", 0.25, "faces")
    }
    (dataset,) = client.get_run(made["mlflow_run"]).inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("faces", "none")
    again = register_checkpoint(str(checkpoint), "faces", alias="challenger")  # equal files: the same version
    assert (again["version"], again["existed"]) == ("1", True)
    assert load_export("models:/faces@challenger")[1] == load_export(checkpoint)[1]


def test_an_alias_moves_to_the_new_version(tmp_path: Path) -> None:
    first, second = random_export(tmp_path / "a", "video"), random_export(tmp_path / "b", "video", layers=1)
    register_checkpoint(str(first), "moving", alias="champion")
    assert register_checkpoint(str(second), "moving", alias="champion")["version"] == "2"
    assert load_export("models:/moving@champion")[1].model.layers == 1
    assert load_export("models:/moving/1")[1].model.layers == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing@champion", r"there is no model nothing.*mfctl register"),
        ("models:/nothing/7", r"models:/nothing/7 does not exist"),
        ("models:/nothing", r"Write models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_model_is_reported_with_the_remedy(uri: str, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        load_export(uri)


@pytest.mark.parametrize(("name", "alias"), [("a/b", None), ("", None), ("faces", "latest"), ("faces", "v1")])
def test_wrong_names_are_refused(checkpoint: Path, name: str, alias: str | None) -> None:
    with pytest.raises(UserInputError, match="Use letters"):
        register_checkpoint(str(checkpoint), name, alias=alias)


def test_a_registry_that_does_not_answer_is_reported(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InfrastructureError, match=r"registry at http://127.0.0.1:9 failed: .*same command again"):
        load_export("models:/faces@champion")
    result = CliRunner().invoke(app, ["register", str(checkpoint), "faces", "--alias", "champion"])
    assert result.exit_code == 1
    assert "Check MLFLOW_TRACKING_URI and the server" in result.stderr
    assert not list(tmp_path.glob("mfctl-register-*"))


def test_an_outage_is_not_taken_for_a_missing_model(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr("mlflow.MlflowClient.get_registered_model", refuse)
    with pytest.raises(InfrastructureError, match="connection reset"):
        load_export("models:/nothing@champion")


def test_an_outage_while_the_name_is_made_is_reported(
    checkpoint: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr("mlflow.MlflowClient.create_registered_model", refuse)
    with pytest.raises(InfrastructureError, match="connection reset"):
        register_checkpoint(str(checkpoint), "unnamed", alias=None)
