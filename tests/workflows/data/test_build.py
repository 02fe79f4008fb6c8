"""Dataset build: all or nothing, exact accounting, clips that can be reconstructed."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import probe
from preprocessing.toyworld.audio_reader import read_audio
from preprocessing.toyworld.world import ToyConfig, write_toyworld
from tests.helpers.error_rate import error_rate
from tests.helpers.media_folder import FPS, RATE, make_folder, write_clip
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset
from workflows.data.reconstruct import reconstruct_clip

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)
ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared" / "media"
COUNTS = {"sources": 5, "spans": 6, "accepted": 3, "rejected": 3}


def quiet(*_) -> None: ...


def content(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workflow")
    make_folder(folder / "media")
    counts = build_dataset([str(folder / "media")], str(folder / "out"), CONFIG, progress=quiet)
    return folder, counts


def test_counts_add_up_and_verify(made):
    folder, counts = made
    assert {key: counts[key] for key in COUNTS} == COUNTS
    assert counts["spans"] == counts["accepted"] + counts["rejected"]
    assert counts["rejects_by_reason"] == {"no_audio": 1, "too_short": 1, "unreadable": 1}
    assert counts["hours"] > 0
    again = inspect_dataset(str(folder / "out"), verify=True)
    assert {key: again[key] for key in counts} == counts


def test_verify_detects_a_flipped_bit_a_missing_file_and_an_extra_file(made, tmp_path):
    folder, _ = made
    for number, damage in enumerate((_flip, Path.unlink, lambda path: path.with_name("stray.parquet").touch())):
        copy = tmp_path / str(number)
        subprocess.run(["cp", "-r", str(folder / "out"), str(copy)], check=True)
        damage(min((copy / "clips").iterdir()))
        with pytest.raises(ValueError, match="is inconsistent"):
            inspect_dataset(str(copy), verify=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_the_same_command_again_changes_nothing(made):
    folder, counts = made
    before = content(folder / "out")
    assert build_dataset([str(folder / "media")], str(folder / "out"), CONFIG, progress=quiet) == counts
    assert content(folder / "out") == before


def test_another_configuration_is_rejected_with_the_difference(made):
    folder, _ = made
    before = content(folder / "out")
    with pytest.raises(ValueError, match=r"min_chunks: 2 -> 3"):
        build_dataset([str(folder / "media")], str(folder / "out"), replace(CONFIG, min_chunks=3), progress=quiet)
    assert content(folder / "out") == before


def test_the_number_of_workers_does_not_change_the_fingerprint():
    assert replace(CONFIG, workers=2).fingerprint == CONFIG.fingerprint


def test_wrong_input_writes_nothing(made, tmp_path):
    folder, _ = made
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "text.mp4").write_text("no media")
    good = str(folder / "media" / "good.mp4")
    for sources, out, message in (
        ([str(tmp_path / "missing")], "new", "no such file"),
        ([str(tmp_path / "text.mp4")], "new", "not readable media"),
        ([str(tmp_path / "used")], "new", "no media files"),
        ([good], "used", "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            build_dataset(sources, str(tmp_path / out), CONFIG, progress=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.mp4", "used"]


def test_dry_run_writes_nothing(made, tmp_path):
    folder, _ = made
    plan = build_dataset([str(folder / "media")], str(tmp_path / "out"), CONFIG, dry_run=True)
    assert (plan["sources"], plan["units"]) == (5, 3)
    assert not (tmp_path / "out").exists()


def test_a_run_stopped_between_units_resumes_to_the_same_bytes(made, tmp_path):
    folder, counts = made

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset([str(folder / "media")], str(tmp_path / "out"), CONFIG, progress=stop)
    with pytest.raises(ValueError, match="unfinished"):
        open_dataset(str(tmp_path / "out"))
    assert len(list((tmp_path / "out" / "_done").iterdir())) == 1
    assert build_dataset([str(folder / "media")], str(tmp_path / "out"), CONFIG, progress=quiet) == counts
    assert content(tmp_path / "out") == content(folder / "out")


def test_a_build_after_a_killed_driver_equals_an_uninterrupted_build(made, tmp_path):
    folder, counts = made
    out = tmp_path / "out"
    script = (
        "import sys; from fractions import Fraction; from workflows.data.build import build_dataset;"
        "from preprocessing.config import PreprocessConfig;"
        "build_dataset([sys.argv[1]], sys.argv[2],"
        " PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2))"
    )
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(folder / "media"), str(out)],
        cwd=root,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    limit = time.monotonic() + 60
    while not (out / "_sources.parquet").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert build_dataset([str(folder / "media")], str(out), CONFIG, progress=quiet) == counts
    assert content(out) == content(folder / "out")


def test_new_sources_extend_the_dataset(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_clip(folder / "a.mp4", 1.2)
    build_dataset([str(folder)], str(tmp_path / "out"), CONFIG, progress=quiet)
    before = content(tmp_path / "out" / "clips")
    write_clip(folder / "b.mp4", 1.3)
    counts = build_dataset([str(folder)], str(tmp_path / "out"), CONFIG, progress=quiet)
    assert (counts["sources"], counts["accepted"]) == (2, 2)
    assert before.items() <= content(tmp_path / "out" / "clips").items()
    assert inspect_dataset(str(tmp_path / "out"), verify=True)["verified"]


def test_reconstruction_has_the_length_of_the_clip_and_overwrites_nothing(made, tmp_path):
    folder, _ = made
    data = open_dataset(str(folder / "out"))
    clip = next(clip for clip in data if clip.source_uri.endswith("good.mp4"))
    out = tmp_path / "again.mp4"
    facts = reconstruct_clip(str(folder / "out"), clip.id, str(out))
    assert (facts["frames"], facts["fps"]) == (49, 24.0)
    frames, wave = _decoded(out)
    assert (len(frames), len(wave)) == (49, round(49 / 24 * RATE))
    with pytest.raises(ValueError, match="--overwrite"):
        reconstruct_clip(str(folder / "out"), clip.id, str(out))


def test_a_reconstructed_toy_clip_has_equal_frames_and_syllables(tmp_path):
    write_toyworld(tmp_path / "toy", clips=2, seconds=6.0, seed=3)
    build_dataset(
        [str(tmp_path / "toy")], str(tmp_path / "out"), replace(CONFIG, window_seconds=Fraction(10)), progress=quiet
    )
    recognized, spoken = [], []
    for clip in open_dataset(str(tmp_path / "out")):
        reconstruct_clip(str(tmp_path / "out"), clip.id, str(tmp_path / f"{clip.id}.mp4"))
        frames, wave = _decoded(tmp_path / f"{clip.id}.mp4")
        source, _ = _decoded(Path(clip.source_uri.removeprefix("file://")))
        assert _psnr(frames, source[: len(frames)]) >= 26
        end = len(wave) / RATE
        recognized.append([w["word"] for w in read_audio(wave, RATE, ToyConfig()).syllables if w["end"] < end - 0.2])
        spoken.append([w.word for w in clip.transcript if w.end < end - 0.2])
    assert error_rate(recognized, spoken) < 0.05


def _decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        frames, wave = decoder.read(1000)
    assert frames is not None
    assert wave is not None
    return frames, wave


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_contact_sheet(made, tmp_path):
    folder, _ = made
    inspect_dataset(str(folder / "out"), sheet=str(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width > 1000


@pytest.mark.slow
def test_ray_workers_give_the_same_bytes(made, tmp_path):
    folder, counts = made
    assert (
        build_dataset([str(folder / "media")], str(tmp_path / "out"), replace(CONFIG, workers=2), progress=quiet)
        == counts
    )
    assert content(tmp_path / "out") == content(folder / "out")


def test_clips_of_deleted_sources_stay_with_a_note(tmp_path, capsys):
    media = tmp_path / "media"
    write_toyworld(media, clips=3, seconds=2.0, size=32, jobs=1)
    config = replace(CONFIG, sizes=((32, 32),))
    first = build_dataset([str(media)], str(tmp_path / "out"), config, progress=quiet)
    assert "no longer exist" not in capsys.readouterr().err
    next(media.glob("*.mp4")).unlink()
    assert build_dataset([str(media)], str(tmp_path / "out"), config, progress=quiet) == first
    assert "1 sources of this dataset no longer exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_build_requests_no_memory_from_ray(tmp_path):
    """An autoscaler may see only the CPUs of a machine type; a task that requests memory is then never scheduled."""
    write_toyworld(tmp_path / "media", clips=4, seconds=2.0, size=32, jobs=1)
    code = """if True:
        import logging, ray
        from workflows.cli.app import main
        ray.init(num_cpus=2, _memory=100, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        main()"""
    sets = ("window_seconds=2", "sources_per_unit=1", "workers=2")
    words = ["preprocess", "media", "out", *(word for value in sets for word in ("--set", value))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "RAY_AUTH_MODE": "disabled"}
    run = [sys.executable, "-c", code, *words]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=100, capture_output=True)
    assert inspect_dataset(str(tmp_path / "out"), verify=True)["accepted"] == 4


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real media in ../shared/media")
def test_real_clips_become_rows_or_rejects_with_a_reason(tmp_path):
    names = ["talking/linly_answer_short.mp4", "talking/grid_bbaf2n.mpg", "nasty/opus_6ch_vp9_1s.webm"]
    names += [
        "nasty/decrypt_needed_cenc.mp4",
        "nasty/names/-video-with-dash-.mp4",
        "nasty/rot_180.mov",
        "nasty/zero_length.webm",
        "nasty/truncated_qt_596s.mp4",
    ]
    listed = "uri\n" + "\n".join(str((REAL / name).resolve()) for name in names) + "\n"
    (tmp_path / "list.csv").write_text(listed)
    counts = build_dataset([str(tmp_path / "list.csv")], str(tmp_path / "out"), CONFIG, progress=quiet)
    assert (counts["sources"], counts["accepted"]) == (8, 4)
    assert counts["rejects_by_reason"] == {"corrupt": 1, "no_audio": 2, "no_video": 1, "unreadable": 1}
    assert inspect_dataset(str(tmp_path / "out"), verify=True)["verified"]
