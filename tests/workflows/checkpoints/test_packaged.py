"""Packaged models: names as checkpoints, packing, cards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from mfcore.errors import UserInputError
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.reader import open_dataset
from preprocessing.records import Word
from tests.helpers.packaged_talker import CARD, english_export, package_talker
from workflows.checkpoints import packaged
from workflows.checkpoints.load import load_export, load_weights, locate_export
from workflows.checkpoints.pack import main, pack_model
from workflows.cli.app import app
from workflows.evaluation.sweep import identify_checkpoint
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.sampling import SamplingParams
from workflows.training.resolve import world_of

EVALUATION = {"commands": ["mfctl evaluate x"], "clips": 2, "mode": "few", "steps": 4, "seeds": 2}


@pytest.fixture
def talker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return package_talker(tmp_path, monkeypatch)


def sweep_rows() -> list[dict[str, Any]]:
    """Return rows as in results.json: two noise seeds, another step count, a window, real clips."""
    row: dict[str, Any] = {
        "mode": "few",
        "steps": 4,
        "nfe": 4,
        "window": "all",
        "detail": {"sync": {"low": 0.7, "high": 0.9}},
    }
    return [
        {**row, "metrics": {"sync": 0.8, "entropy": 1.0}},
        {**row, "metrics": {"sync": 0.9, "entropy": 1.0}},
        {**row, "steps": 8, "metrics": {"sync": 0.1}},
        {**row, "window": "0-5", "metrics": {"sync": 0.1}},
        {**row, "mode": "real", "steps": 0, "metrics": {"sync": 0.95}},
    ]


def test_the_name_of_a_packaged_model_is_a_checkpoint(talker: Path) -> None:
    assert locate_export("toy-talker") == str(talker)
    assert load_export("toy-talker")[1].world == "toyworld-english/1"
    assert identify_checkpoint("toy-talker").label == "toy-talker"
    assert packaged.resolve_checkpoint("toy-talker") == "toy-talker"


def test_a_file_of_this_name_comes_first(talker: Path) -> None:
    (talker.parents[1] / "toy-talker").mkdir()
    assert packaged.resolve_checkpoint("toy-talker") == str(talker.parents[1] / "toy-talker")
    with pytest.raises(UserInputError, match="neither a run"):
        locate_export("toy-talker")


@pytest.mark.parametrize("name", ["toy-walker", "../models/toy-talker", "Toy-Talker", ""])
def test_other_names_are_paths(talker: Path, name: str) -> None:
    assert packaged.packaged_folder(name) is None
    assert Path(packaged.resolve_checkpoint(name)).is_absolute()


def test_an_unknown_checkpoint_is_reported_with_the_packaged_models(talker: Path) -> None:
    with pytest.raises(UserInputError, match=r"toy-walker does not exist: .* packaged model \(toy-talker\)"):
        locate_export("toy-walker")


def test_weights_are_stored_in_half_and_load_as_float32(talker: Path) -> None:
    with safe_open(talker / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {w.dtype for w in stored.values() if w.ndim > 1} == {torch.bfloat16}
    before, after = load_weights(talker.parents[1] / "run" / "export"), load_weights("toy-talker")
    assert before.keys() == after.keys()
    assert {w.dtype for w in after.values()} == {torch.float32}
    for name, weight in before.items():
        assert torch.allclose(after[name], weight, rtol=2**-8, atol=0)
    names = {"config.json", "preprocessor_config.json", "model.safetensors", "card.json", "README.md"}
    assert {file.name for file in talker.iterdir()} == names


def test_generated_latents_hardly_change(talker: Path) -> None:
    made: list[dict[str, torch.Tensor]] = []
    for path in (talker.parents[1] / "run" / "export", "toy-talker"):
        pipeline = StreamingPipeline.from_checkpoint(path)
        frame = torch.zeros(*pipeline.frame_size, 3, dtype=torch.uint8)
        cond = pipeline.encode_conditions(
            caption="a face", transcript=[Word(word="/hh/hi", start=0.1, end=0.4)], first_frame=frame
        )
        chunks = list(pipeline.generate_chunks(cond, 3, SamplingParams(steps=4)))
        made.append({m: torch.cat([chunk[m].latents for chunk in chunks], 1) for m in (VIDEO, AUDIO)})
    for m in (VIDEO, AUDIO):
        change = (made[1][m] - made[0][m]).norm() / made[0][m].norm()
        assert 0 < change < 0.03


def test_the_card_has_the_metrics_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(sweep_rows()))
    export, folder = english_export(tmp_path / "run"), tmp_path / "models" / "m"
    card = pack_model(export, folder, card=CARD | {"evaluation": EVALUATION}, results=tmp_path / "results.json")
    assert set(card.metrics) == {"sync"}
    assert (card.metrics["sync"].value, card.metrics["sync"].real) == (pytest.approx(0.85), 0.95)
    assert (card.metrics["sync"].low, card.metrics["sync"].high) == (pytest.approx(0.7), pytest.approx(0.9))
    text = (folder / "README.md").read_text()
    assert all(
        part in text for part in ("| `sync` | 0.85 | 0.7 to 0.9 | 0.95 |", "9.5 hours", "mfctl train", "It speaks")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": None}, "limits"),
        ({"licence": "MIT"}, "licence"),
        ({"evaluation": EVALUATION | {"steps": 3}}, "no row of mode few with 3 steps"),
        ({}, "the card has no evaluation"),
    ],
)
def test_a_wrong_card_is_refused_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(sweep_rows()))
    export = english_export(tmp_path / "run")
    with pytest.raises(UserInputError, match=message):
        pack_model(export, tmp_path / "models" / "m", card=CARD | change, results=tmp_path / "results.json")
    assert not (tmp_path / "models").exists()


def test_packaged_models_have_a_largest_size(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.checkpoints.pack.MAX_BYTES", packaged.folder_bytes(talker) + 1000)
    with pytest.raises(UserInputError, match=r"would have .* MB: use at most"):
        pack_model(talker.parents[1] / "run" / "export", talker.parent / "second", card=CARD)
    pack_model(talker.parents[1] / "run" / "export", talker, card=CARD)  # replaces itself


def test_one_command_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    export = english_export(tmp_path / "run")
    (tmp_path / "card.yaml").write_text(json.dumps(CARD))
    main([str(export), "toy-talker", "--card", str(tmp_path / "card.yaml"), "--models", str(tmp_path / "models")])
    assert "parameters" in capsys.readouterr().out
    monkeypatch.setattr(packaged, "MODELS_DIR", tmp_path / "models")
    assert packaged.packaged_names() == ["toy-talker"]
    with pytest.raises(SystemExit) as stopped:
        main([str(export), "../x", "--card", str(tmp_path / "card.yaml")])
    assert stopped.value.code == 2


def test_models_lists_name_stage_size_and_metrics(talker: Path) -> None:
    text = CliRunner().invoke(app, ["models"]).stdout
    assert all(part in text for part in ("toy-talker: A character", "mutual", "million", "MB", "English", "9.5 hours"))
    found = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)["models"]
    assert [(m["name"], m["stage"], m["language"]) for m in found] == [("toy-talker", "mutual", "English")]
    assert found[0]["parameters"] == sum(w.numel() for w in load_weights("toy-talker").values())


def test_training_finds_a_parent_by_its_name(talker: Path, toy_data: str) -> None:
    words = ["train", "--stage", "joint", "--data", toy_data, "--from", "toy-talker", "--dry-run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "toy-talker is of stage mutual" in result.stderr


def test_training_records_the_world_of_the_dataset(toy_data: str) -> None:
    assert world_of(open_dataset(toy_data)) == "toyworld/1"


def test_evaluation_without_data_names_the_commands_of_the_card(talker: Path) -> None:
    pack_model(talker.parents[1] / "run" / "export", talker, card=CARD | {"evaluation": EVALUATION})
    result = CliRunner().invoke(app, ["evaluate", "toy-talker"])
    assert result.exit_code == 2
    assert "Use --data DATASET. Held-out clips: mfctl evaluate x" in result.stderr


def test_without_models_the_list_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "MODELS_DIR", tmp_path)
    assert CliRunner().invoke(app, ["models"]).stdout == "no packaged models\n"
    with pytest.raises(UserInputError, match="toy-talker is not part of this installation. Name a checkpoint"):
        packaged.default_model()


def test_a_damaged_card_is_reported(talker: Path) -> None:
    (talker / "card.json").write_text("{")
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 2
    assert "card.json cannot be read" in result.stderr


def test_the_packaged_weights_fit_into_the_package() -> None:
    total = sum(packaged.folder_bytes(packaged.MODELS_DIR / name) for name in packaged.packaged_names())
    assert total <= packaged.MAX_BYTES
    assert [packaged.model_card(name).name for name in packaged.packaged_names()] == packaged.packaged_names()
