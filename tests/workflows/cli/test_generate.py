"""`mfctl generate` with and without a checkpoint."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preprocessing.media.probe import probe
from tests.helpers.packaged_talker import package_talker
from workflows.checkpoints import packaged
from workflows.cli.app import app
from workflows.utils.environment import resolve_path

QUICK = ["--steps", "1", "--json"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    package_talker(tmp_path, monkeypatch)
    return tmp_path / "here"


def test_without_a_checkpoint_the_packaged_talker_speaks(folder: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "out.mp4", "--transcript", "Nice to meet you.", *QUICK])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["path"] == str(folder / "out.mp4")
    assert [w["word"] for w in facts["transcript"]][:3] == ["/n/Nice", "/ay/", "/s/"]
    info = probe(folder / "out.mp4")
    assert info.video is not None
    assert info.audio is not None


def test_a_checkpoint_may_be_a_name_or_a_path(folder: Path) -> None:
    runs = ["toy-talker", str(folder.parent / "run" / "export")]
    for run, out in zip(runs, ("a.mp4", "b.mp4"), strict=True):
        result = CliRunner().invoke(app, ["generate", run, out, "--seconds", "0.5", *QUICK])
        assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {"a.mp4", "b.mp4"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/mutual"], "the output file is missing: {here}/runs/mutual does not end in .mp4"),
        (["toy-talker"], "the output file is missing: toy-talker does not end in .mp4"),
        (["a", "b", "c.mp4"], "3 paths are given"),
        (["toy-walker", "c.mp4"], "does not exist"),
    ],
)
def test_wrong_paths_give_one_message(folder: Path, words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 2
    assert message.format(here=resolve_path(".")) in result.stderr
    assert list(folder.iterdir()) == []


def test_without_a_packaged_talker_the_message_asks_for_a_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "MODELS_DIR", folder)
    result = CliRunner().invoke(app, ["generate", "out.mp4"])
    assert result.exit_code == 2
    assert "toy-talker is not part of this installation. Name a checkpoint" in result.stderr


@pytest.mark.parametrize("local", [["--weights", "raw"], ["--precision", "bf16"], ["--compile"], ["--steps", "4"]])
def test_options_of_the_local_network_are_refused_with_a_server(local: list[str], folder: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "a.mp4", "--server", "http://127.0.0.1:9", *local])
    assert result.exit_code == 2
    assert "has its checkpoint and execution options" in result.output
    assert not list(folder.iterdir())
