"""Table of invocations: exit code, text of the message, and nothing written by a refused command.

Words in braces are prepared inputs: see ``inputs``.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.random_exports import random_export
from workflows.cli.app import app

VERBS = (
    *("doctor", "demo", "mlflow", "toyworld", "manifest", "preprocess", "inspect", "reconstruct", "train", "generate"),
    *(
        "evaluate",
        "models",
        "study",
        "bench",
        "bench train",
        "bench stream",
        "bench preprocess",
        "submit",
        "status",
        "logs",
        "stop",
    ),
)
LONG = "x" * 300
GENERATE = "generate {export} out.mp4 --first-frame {image}"
TRAIN = "train --stage video --data {data} --set"

WRONG = [
    # usage
    ("doctr", "Did you mean 'doctor'?"),
    ("doctor extra", "unexpected extra argument"),
    ("doctor --jsn", "No such option"),
    ("demo extra", "unexpected extra argument"),
    ("demo --out", "requires an argument"),
    ("demo --out {file}", "exists"),
    (f"demo --out {LONG}", "300 bytes"),
    ("demo --out ~nosuchuser/x", "no user of this name"),
    ("mlflow --port -1", "greater than or equal to 1"),
    ("mlflow --port 0 --dry-run", "greater than or equal to 1"),
    ("mlflow --port 99999999 --dry-run", "less than or equal to 65535"),
    ("mlflow --port x", "valid integer"),
    # toyworld
    ("toyworld", "Missing argument"),
    ("toyworld out --clips 0", "greater than or equal to 1"),
    ("toyworld out --clips -3", "greater than or equal to 1"),
    ("toyworld out --clips 99999999999", "less than or equal to"),
    ("toyworld out --clips 1.5", "--clips"),
    ("toyworld out --seconds 0", "seconds 0"),
    ("toyworld out --seconds -1", "seconds -1"),
    ("toyworld out --seconds nan", "seconds nan"),
    ("toyworld out --seconds inf", "seconds inf"),
    ("toyworld out --seconds 3601", "1 to 3600"),
    ("toyworld out --size 0", "size 0"),
    ("toyworld out --size -64", "size -64"),
    ("toyworld out --size 63", "even size"),
    ("toyworld out --size 100000", "32 to 512"),
    ("toyworld out --fps 0", "fps 0"),
    ("toyworld out --fps 1000", "8 to 120"),
    ("toyworld out --sample-rate 0", "sample_rate=0"),
    ("toyworld out --sample-rate 999999999999", "sample_rate=999999999999"),
    ("toyworld out --seed -1", "seed=-1"),
    ("toyworld out --jobs 0", "--jobs"),
    ("toyworld out --jobs 1000000", "--jobs"),
    (f"toyworld {LONG}", "300 bytes"),
    ("toyworld ~nosuchuser/x", "no user of this name"),
    ("toyworld {file}", "files that are not of a toy world"),
    ("toyworld {folder}", "files that are not of a toy world"),
    ("toyworld {file}/below", "ot a directory"),
    # preprocess
    ("preprocess", "Missing argument"),
    ("preprocess {clips}", "Missing argument"),
    ("preprocess nowhere out", "nowhere"),
    ("preprocess {bytes} out", "no such file"),
    ("preprocess {file} out", "not readable media"),
    ("preprocess {empty} out", "no media files"),
    ("preprocess {clips} {folder}", "no dataset"),
    ("preprocess {clips} out --modality both", "--modality"),
    ("preprocess {clips} out --sizes 64", "--sizes"),
    ("preprocess {clips} out --sizes 64x", "--sizes"),
    ("preprocess {clips} out --sizes 0x64", "sizes=0"),
    ("preprocess {clips} out --sizes 63x64", "63x64"),
    ("preprocess {clips} out --sizes -64x64", "--sizes"),
    ("preprocess {clips} out --sizes 100000000x100000000", "sizes=100000000: use 1 to 8192"),
    ("preprocess {clips} out --audio-track -1", "--audio-track"),
    ("preprocess {clips} out --codec-video wan", "--codec-video wan"),
    ("preprocess {clips} out --codec-video wan:nowhere", "nowhere"),
    ("preprocess {clips} out --codec-audio mp3", "--codec-audio mp3"),
    ("preprocess {clips} out --text words:x", "--text"),
    ("preprocess {clips} out --sync lips", "--sync lips"),
    ("preprocess {clips} out --sync syncnet:nowhere", "nowhere"),
    ("preprocess {clips} out --sync syncnet:{file}", "SyncNet"),
    ("preprocess {clips} out --transcribe ears", "--transcribe ears"),
    ("preprocess {clips} out --transcribe whisper:{empty}", "Whisper"),
    ("preprocess {clips} out --set windw_seconds=3", "did you mean window_seconds?"),
    ("preprocess {clips} out --set window_seconds", "not of the form"),
    ("preprocess {clips} out --set window_seconds=[", "not YAML"),
    ("preprocess {clips} out --set window_seconds=0", "window_seconds=0"),
    ("preprocess {clips} out --set people.margin=1", "Add --people"),
    ("preprocess {clips} out --caption measured", "Add --people"),
    ("preprocess {clips} out --set caption.frames=2", "Add --people"),
    ("preprocess {clips} out --caption nowhere", "contains no vision-language model"),
    ("preprocess {clips} out --set window_seconds=-1", "window_seconds=-1"),
    ("preprocess {clips} out --set window_seconds=1e12 --dry-run", "window_seconds=1000000000000: use"),
    ("preprocess {clips} out --set window_seconds=.nan", "window_seconds=nan: use a finite number"),
    ("preprocess {clips} out --set window_seconds=.inf", "window_seconds=inf: use a finite number"),
    ("preprocess {clips} out --set chunk_seconds=0", "chunk_seconds=0: use"),
    ("preprocess {clips} out --set chunk_seconds=-1", "chunk_seconds=-1: use"),
    ("preprocess {clips} out --set min_chunks=0", "min_chunks=0"),
    ("preprocess {clips} out --set audio.window=-5", "audio.window=-5: use 1 to 65536"),
    ("preprocess {clips} out --set audio.hop=0", "audio.hop=0"),
    ("preprocess {clips} out --set audio.sample_rate=0", "audio.sample_rate=0"),
    ("preprocess {clips} out --set video.block=0", "video.block=0"),
    ("preprocess {clips} out --set video.fps=0", "video.fps=0"),
    ("preprocess {clips} out --set sizes=[]", "sizes is empty"),
    ("preprocess {clips} out --set workers=-1", "workers=-1"),
    ("preprocess {clips} out --set text_width=0", "text_width=0"),
    ("preprocess {clips} out --set sources_per_unit=0", "sources_per_unit=0"),
    ("preprocess {clips} out --set encoder.gpus=-1", "encoder.gpus=-1"),
    ("preprocess {clips} out --set encoder.gpus=7", "encoder.gpus=7"),
    ("preprocess {clips} out --config nowhere.yaml", "nowhere.yaml"),
    ("preprocess {clips} out --config {image}", "neither YAML nor JSON"),
    ("preprocess {clips} out --config {file}", "must contain settings by name"),
    ("preprocess {clips} s3://", "names no bucket"),
    ("preprocess {clips} http://127.0.0.1:9/x", "object storage"),
    (f"preprocess {{clips}} {LONG}", "300 bytes"),
    ("preprocess ~nosuchuser/x out", "no user of this name"),
    # manifest
    ("manifest emilia", "Missing argument"),
    ("manifest vhs {folder} out.jsonl", "vhs"),
    ("manifest emilia nowhere out.jsonl", "nowhere"),
    ("manifest emilia {folder} {file}", "does not exist yet"),
    # inspect
    ("inspect", "Missing argument"),
    ("inspect nowhere", "nowhere is not a dataset"),
    ("inspect {folder}", "is not a dataset"),
    ("inspect {file}", "is not a dataset"),
    ("inspect {bytes}", "is not a dataset"),
    ("inspect s3://", "names no bucket"),
    ("inspect ftp://host/x", "object storage"),
    ("inspect {data} --sheet {file}", "--sheet"),
    ("inspect {data} --sheet nowhere/x.png", "--sheet"),
    (f"inspect {{data}} --sheet {LONG}", "300 bytes"),
    # reconstruct
    ("reconstruct {data}", "Missing argument"),
    ("reconstruct nowhere clip out.mp4", "nowhere is not a dataset"),
    ("reconstruct {data} noclip out.mp4", "noclip"),
    ("reconstruct {data} {id} out.wav", "ends in .mp4"),
    ("reconstruct {data} {id} out", "ends in .mp4"),
    ("reconstruct {data} {id} {mp4}", "exists"),
    ("reconstruct {data} {id} {mp4folder} --overwrite", "is a folder"),
    ("reconstruct {data} {id} {file}/out.mp4", "is a file"),
    (f"reconstruct {{data}} {{id}} {LONG}.mp4", "304 bytes"),
    # train
    ("train", "Missing option"),
    ("train --stage vido", "'video'"),
    ("train --stage video --preste tiny", "--preset"),
    ("train --stage video --data {data} --preset huge", "unknown preset 'huge'"),
    ("train --stage video", "mfctl preprocess"),
    ("train --stage joint", "mfctl preprocess"),
    ("train --stage video --data nowhere", "nowhere is not a dataset"),
    ("train --stage video --data s3://", "names no bucket"),
    ("train --stage joint --data {data} --from nowhere", "nowhere"),
    ("train --stage video --data {data} --run a/b", "--run 'a/b'"),
    ("train --stage video --data {data} --run ..", "--run '..'"),
    ("train --stage video --data {data} --run {newline}", "printable"),
    (f"train --stage video --data {{data}} --run {LONG}", "too long"),
    ("train --stage video --data {data} --config nowhere", "nowhere"),
    ("train --stage video --data {data} --init-video-from nowhere", "nowhere"),
    (f"{TRAIN} optim.lr=.nan", "optim.lr=nan: use a finite number"),
    (f"{TRAIN} optim.lr=.inf", "optim.lr=inf: use a finite number"),
    (f"{TRAIN} optim.lr=0", "optim.lr=0.0: use a number above 0"),
    (f"{TRAIN} optim.lr=-1", "optim.lr=-1.0"),
    (f"{TRAIN} optim.lr=x", "optim.lr"),
    (f"{TRAIN} optim.clip=0", "optim.clip=0.0"),
    (f"{TRAIN} optim.betas=[0.9,1.5]", "optim.betas=1.5"),
    (f"{TRAIN} optim.warm_up=-1", "optim.warm_up=-1"),
    (f"{TRAIN} model.layers=0", "model.layers=0: use 1 to"),
    (f"{TRAIN} model.layers=-1", "model.layers=-1"),
    (f"{TRAIN} model.dim=0", "model.dim=0"),
    (f"{TRAIN} model.dim=-128", "model.dim=-128"),
    (f"{TRAIN} model.dim=9999999", "model.dim=9999999"),
    (f"{TRAIN} model.heads=0", "model.heads=0: use 1 to"),
    (f"{TRAIN} model.heads=3", "heads 3"),
    (f"{TRAIN} model.kv_heads=0", "model.kv_heads=0"),
    (f"{TRAIN} model.mlp_ratio=-1", "model.mlp_ratio=-1.0"),
    (f"{TRAIN} model.mlp_ratio=0", "model.mlp_ratio=0.0"),
    (f"{TRAIN} model.window_chunks=0", "model.window_chunks=0"),
    (f"{TRAIN} seed=-1", "seed=-1"),
    (f"{TRAIN} steps=0", "steps=0"),
    (f"{TRAIN} steps=1e99", "steps"),
    (f"{TRAIN} log_every=0", "log_every=0"),
    (f"{TRAIN} data.batch=0", "data.batch=0"),
    (f"{TRAIN} data.micro=0", "data.micro=0"),
    (f"{TRAIN} data.chunks=[9999,9999]", "the longest clip"),
    (f"{TRAIN} data.chunks=[3,1]", "data.chunks"),
    (f"{TRAIN} data.held_out=0", "data.held_out=0.0"),
    (f"{TRAIN} data.held_out=0.9999999", "data.held_out=0.9999999: use"),
    (f"{TRAIN} data.drop_voice=2", "drop_voice"),
    (f"{TRAIN} data.whitening.video=9", "data.whitening.video=9.0"),
    (f"{TRAIN} ema.decay=1", "EMA decay"),
    (f"{TRAIN} objective.time.shift.video=0", "shift.video=0.0"),
    (f"{TRAIN} objective.time.logit_std=-1", "logit_std=-1.0"),
    (f"{TRAIN} engine.workers=0", "engine.workers=0"),
    (f"{TRAIN} engine.workers=[3,2]", "engine.workers"),
    (f"{TRAIN} engine.sequence=0", "engine.sequence=0"),
    (f"{TRAIN} engine.zero_stage=7", "engine.zero_stage"),
    (f"{TRAIN} engine.use_gpu=true", "no CUDA device"),
    (f"{TRAIN} checkpoint.every=0", "checkpoint.every=0"),
    (f"{TRAIN} checkpoint.keep=0", "checkpoint.keep=0"),
    (f"{TRAIN} stepz=3", "did you mean steps?"),
    (f"{TRAIN} model=3", "setting model"),
    # generate
    ("generate", "Missing argument"),
    ("generate nowhere out.mp4", "nowhere"),
    ("generate {folder} out.mp4", "neither a run"),
    ("generate {export} out.wav", "ends in .mp4"),
    ("generate {export} {mp4}", "--overwrite"),
    ("generate {export} {mp4folder} --overwrite", "is a folder"),
    ("generate {export} {file}/out.mp4", "is a file"),
    (f"generate {{export}} {LONG}.mp4", "304 bytes"),
    ("generate {export} out.mp4", "--first-frame"),
    ("generate {export} out.mp4 --first-frame nowhere.png", "nowhere.png"),
    ("generate {export} out.mp4 --first-frame {cutpng}", "cannot be read"),
    ("generate {export} out.mp4 --first-frame {cutjpg}", "cannot be read"),
    ("generate {export} out.mp4 --first-frame {bomb}", "cannot be read"),
    ("generate {export} out.mp4 --first-frame {file}", "neither an image nor a video"),
    ("generate {export} out.mp4 --first-frame {folder}", "cannot be read"),
    (f"{GENERATE} --voice nowhere.wav", "--voice"),
    (f"{GENERATE} --voice {{image}}", "--voice"),
    (f"{GENERATE} --transcript nowhere.srt", "--transcript nowhere.srt"),
    (f"{GENERATE} --seconds 0", "--seconds 0.0"),
    (f"{GENERATE} --seconds nan", "--seconds nan"),
    (f"{GENERATE} --seconds inf", "--seconds inf"),
    (f"{GENERATE} --seconds 1e12", "at most 86400"),
    (f"{GENERATE} --steps 0", "--steps 0"),
    (f"{GENERATE} --steps 100000000", "--steps 100000000"),
    (f"{GENERATE} --guidance nan", "--guidance nan"),
    (f"{GENERATE} --guidance inf", "--guidance inf"),
    (f"{GENERATE} --guidance -1", "--guidance -1.0"),
    (f"{GENERATE} --trust nan", "--trust nan"),
    (f"{GENERATE} --trust -5", "--trust -5.0: use 0 to 1"),
    (f"{GENERATE} --mode slow", "--mode"),
    (f"{GENERATE} --weights best", "--weights"),
    (f"{GENERATE} --precision fp8", "--precision"),
    (f"{GENERATE} --graphs", "--graphs"),
    (f"{GENERATE} --transcript words --speed 9", "--speed 9.0: use 0.5 to 2"),
    (f"{GENERATE} --transcript words --pauses -1", "--pauses -1.0: use 0 to 10"),
    ("generate {folder}", "the output file is missing"),
    ("generate {export} out.mp4 more.mp4", "3 paths are given"),
    # models
    ("models extra", "unexpected extra argument"),
    # evaluate
    ("evaluate", "Missing argument"),
    ("evaluate nowhere", "nowhere"),
    ("evaluate {export} --steps 1,x", "--steps"),
    ("evaluate {export} --steps 0", "--steps"),
    ("evaluate {export} --modes slow", "slow"),
    ("evaluate {export} --guidance nan", "--guidance takes finite numbers"),
    ("evaluate {export} --guidance x", "--guidance"),
    ("evaluate {export} --clips 0", "--clips"),
    ("evaluate {export} --seconds nan --data {data}", "--seconds nan"),
    ("evaluate {export} --seconds -1 --data {data}", "--seconds -1.0"),
    ("evaluate {export} --seeds x", "--seeds"),
    ("evaluate {export} --windows 5-1 --data {data}", "5.0 to 1.0"),
    ("evaluate {export} --windows x --data {data}", "invalid time window"),
    ("evaluate {export} --workers 0", "--workers"),
    ("evaluate {export} --weights ears=x --data {data}", "ears"),
    ("evaluate {export} --precision fp8", "--precision"),
    ("evaluate {export} --data nowhere", "nowhere"),
    # jobs
    ("stop", "mfctl stop --head"),
    ("status raysubmit_none", "no job raysubmit_none"),
    ("submit nowhere.yaml -- doctor", "nowhere.yaml does not exist"),
]
"""Refused commands and a part of their message."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, toy_data: str) -> dict[str, str]:
    """Prepare inputs by the names that the table uses."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("empty", "folder", "adir.mp4"):
        (folder / name).mkdir()
    for name in ("file.txt", "folder/notes.txt", "mine.mp4"):
        (folder / name).write_text("notes")
    image = Image.effect_noise((64, 48), 90).convert("RGB")
    for name in ("image.png", "image.jpg"):
        image.save(folder / name)
        (folder / f"cut-{name}").write_bytes((folder / name).read_bytes()[:700])
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    return {
        "clips": str(Path(toy_data).parent / "clips"),
        "data": toy_data,
        "id": "anything",
        "export": str(random_export(folder / "run", "mutual")),
        "empty": str(folder / "empty"),
        "folder": str(folder / "folder"),
        "file": str(folder / "file.txt"),
        "mp4": str(folder / "mine.mp4"),
        "mp4folder": str(folder / "adir.mp4"),
        "image": str(folder / "image.png"),
        "cutpng": str(folder / "cut-image.png"),
        "cutjpg": str(folder / "cut-image.jpg"),
        "bomb": str(folder / "bomb.png"),
        "bytes": os.fsdecode(b"\xff"),
        "newline": "x\ny",
    }


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in an empty folder; logs of internal errors go to another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "here"


def entries(*folders: str | Path) -> set[tuple[str, int, int]]:
    """Return names, sizes and times of all files below the folders."""
    found = [path for folder in folders for path in Path(folder).rglob("*")]
    return {(str(p), p.stat().st_size if p.is_file() else 0, p.stat().st_mtime_ns) for p in found}


def words_of(line: str, inputs: dict[str, str]) -> list[str]:
    return [word.format_map(inputs) if "{" in word else word for word in line.split()]


def test_the_table_names_every_verb() -> None:
    assert len(WRONG) + 3 * len(VERBS) > 150
    assert {line.split()[0] for line, _ in WRONG} >= {v for v in VERBS if " " not in v} - {"bench", "study", "logs"}


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line.replace(LONG, "LONG") for line, _ in WRONG])
def test_wrong_input_exits_with_2_and_writes_nothing(
    inputs: dict[str, str], folder: Path, line: str, message: str
) -> None:
    prepared = Path(inputs["file"]).parent
    before = entries(folder, prepared, inputs["data"])
    result = CliRunner().invoke(app, words_of(line, inputs))
    text = " ".join(result.stderr.replace("\u2502", " ").split())
    assert result.exit_code == 2, result.output
    assert message in text
    assert "Traceback" not in text
    assert result.stderr.count("error: ") + result.stderr.count("Error") == 1, "one message"
    assert result.stdout == ""
    assert entries(folder, prepared, inputs["data"]) == before


JSON = (
    "inspect nowhere",
    "inspect {bytes}",
    "reconstruct {data} noclip out.mp4",
    "train --stage video --data nowhere",
    "generate nowhere out.mp4",
    "evaluate nowhere",
    "toyworld out --size 7",
    "preprocess nowhere out",
    "preprocess {bytes} out",
    "manifest emilia nowhere out.jsonl",
    "status raysubmit_none",
    "stop",
    "demo --out {file}",
)
"""Refused commands that take --json."""


@pytest.mark.parametrize("line", JSON)
def test_with_json_wrong_input_is_one_object(inputs: dict[str, str], line: str) -> None:
    result = CliRunner().invoke(app, [*words_of(line, inputs), "--json"])
    assert result.exit_code == 2, result.output
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert found["exit_code"] == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_usage_and_writes_nothing(folder: Path, verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert f"mfctl {verb}" in result.output or "Usage:" in result.output
    assert result.stderr == ""
    assert not list(folder.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_refused(folder: Path, verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--no-such-option"])
    assert result.exit_code == 2
    assert "No such option" in result.stderr or "Missing" in result.stderr
    assert not list(folder.iterdir())


RIGHT = [
    ("mlflow --dry-run", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"),
    ("preprocess {clips} out --dry-run", "fingerprint"),
    ("preprocess {clips} out --dry-run --set window_seconds=1", "window_seconds"),
    ("inspect {data}", "accepted"),
    ("inspect {data} --verify", "files, checksums and accounting are correct"),
    ("train --stage video --data {data} --dry-run", "gflop_per_evaluation"),
    ("train --stage video --preset full --dry-run", "missing"),
    ("train --stage joint --preset full --dry-run", "missing"),
    ("train --stage mutual --preset base --dry-run", "missing"),
    ("study --dry-run", "joint"),
    ("status", "no heads, no jobs"),
]
"""Commands that only print, and a part of their output."""


@pytest.mark.parametrize(("line", "message"), RIGHT)
def test_commands_that_only_print_write_nothing(inputs: dict[str, str], folder: Path, line: str, message: str) -> None:
    before = entries(folder, inputs["data"])
    result = CliRunner().invoke(app, words_of(line, inputs))
    assert result.exit_code == 0, result.output
    assert message in result.stdout
    assert entries(folder, inputs["data"]) == before
