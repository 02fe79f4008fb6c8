"""Faults: decoders that hang, exhaust memory or are killed, and full disks."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from preprocessing import pipeline
from preprocessing.config import PreprocessConfig
from preprocessing.io.errors import InfrastructureError
from preprocessing.io.processes import delete_stale_scratch, scratch_dir
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, probe
from preprocessing.pipeline import MAX_DECODER_ATTEMPTS, build_encoders
from preprocessing.records import Clip, Rejected
from preprocessing.sources.discovery import find_sources
from tests.helpers.media_folder import FPS, RATE, write_clip
from tests.helpers.source_processing import process_source
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(1), sources_per_unit=2)
ROOT = Path(__file__).parents[2]
needs_util_linux = pytest.mark.skipif(not shutil.which("prlimit"), reason="memory is limited by util-linux's prlimit")


def spans(path: Path, config: PreprocessConfig = CONFIG) -> list[Clip | Rejected]:
    (source,) = find_sources([str(path)])
    return list(process_source(source, config, build_encoders(config)))


def becomes_true(condition: Callable[[], bool], seconds: float = 20) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def replace_program(folder: Path, program: str, script: str) -> str:
    """Return a folder for PATH with a script as `program`; ``real`` is the original."""
    folder.mkdir(exist_ok=True)
    body = f"#!/bin/sh\nreal={shutil.which(program)}\n{textwrap.dedent(script)}"
    (folder / program).write_text(body)
    (folder / program).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# ------------------------------------------------------------------------------------------------------------- decoders


@pytest.mark.parametrize("program", ["ffmpeg", "ffprobe"])
def test_hanging_clip_is_rejected_and_others_are_not(program, tmp_path, monkeypatch):
    script = 'case "$*" in */hangs.mp4*) exec sleep 1001;; esac\nexec $real "$@"\n'
    (tmp_path / "media").mkdir()
    for name, seconds in (("good", 1.2), ("hangs", 1.3)):
        write_clip(tmp_path / "media" / f"{name}.mp4", seconds)
    monkeypatch.setenv("PATH", replace_program(tmp_path / "bin", program, script))
    config = replace(CONFIG, stall_seconds=3.0)
    counts = build_dataset([str(tmp_path / "media")], str(tmp_path / "out"), config, progress=lambda *_: None)
    assert (counts["accepted"], counts["rejects_by_reason"]) == (1, {"timeout": 1})
    assert not [p for p in psutil.Process().children(recursive=True) if "1001" in p.cmdline()]


def test_decoder_that_stops_loses_only_the_rest(tmp_path):
    path = write_clip(tmp_path / "long.mp4", 10.0)

    class Stopped(Decoder):
        def peek_frames(self, frames):
            if self._frame >= 48:
                os.kill(self._process.pid, signal.SIGSTOP)
            return super().peek_frames(frames)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Decoder", Stopped)
        found = spans(path, replace(CONFIG, stall_seconds=2.5, sizes=((256, 256),)))
    assert [type(one) for one in found[:2]] == [Clip, Clip]
    assert (found[-1].step, found[-1].reason) == ("decode", "timeout")
    assert found[-1].span == pytest.approx((found[-2].span[1] - 1 / 24, 10.0), abs=0.05)


def test_error_output_does_not_prevent_the_timeout(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 1.2)
    monkeypatch.setenv(
        "PATH", replace_program(tmp_path / "bin", "ffmpeg", "while :; do echo no >&2; sleep 0.1; done\n")
    )
    began = time.monotonic()
    with (
        Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE, stall_seconds=1.0) as decoder,
        pytest.raises(MediaError, match="timeout"),
    ):
        decoder.read(10)
    assert time.monotonic() - began < 30


@needs_util_linux
def test_file_above_the_memory_limit_is_rejected(tmp_path):
    """Frames of 6,000 x 6,000, within the filters, in a small file."""
    bomb = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=gray:s=6000x6000:r=1:d=1"]
    subprocess.run([*bomb, "-c:v", "png", str(tmp_path / "bomb.mkv")], check=True)
    assert (tmp_path / "bomb.mkv").stat().st_size < 1 << 20
    config = replace(CONFIG, modality="video", decoder_bytes=96 << 20)
    (only,) = spans(tmp_path / "bomb.mkv", config)
    assert isinstance(only, Rejected)
    assert (only.step, only.reason) == ("decode", "memory"), only.detail
    (good,) = spans(write_clip(tmp_path / "good.mp4", 1.2), config)
    assert isinstance(good, Clip)


@needs_util_linux
def test_a_decoder_ends_with_the_process_that_started_it(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 1.2)
    code = (
        "import sys, time; from fractions import Fraction; from preprocessing.media.decoder import Decoder;"
        "from preprocessing.media.probe import probe;"
        "d = Decoder(sys.argv[1], probe(sys.argv[1]), fps=Fraction(24), size=(64, 64), sample_rate=16000);"
        "print(d._process.pid, flush=True); time.sleep(1000)"
    )
    environment = os.environ | {"PATH": replace_program(tmp_path / "bin", "ffmpeg", "exec sleep 1002\n")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        assert becomes_true(lambda: "1002" in child.cmdline())
        owner.kill()
    assert becomes_true(lambda: not child.is_running())


def test_killed_decoder_is_restarted_with_equal_clips(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", 5.0)
    config = replace(CONFIG, sizes=((256, 256),))
    undisturbed = spans(path, config)
    kills = iter(range(MAX_DECODER_ATTEMPTS - 1))

    class Mortal(Decoder):
        def peek_frames(self, frames):
            if self._frame >= 24 and next(kills, None) is not None:
                os.kill(self._process.pid, signal.SIGKILL)
            return super().peek_frames(frames)

    monkeypatch.setattr(pipeline, "Decoder", Mortal)
    again = spans(path, config)
    assert next(kills, None) is None
    assert [one.span for one in again] == [one.span for one in undisturbed]
    assert all((a.frames == b.frames).all() for a, b in zip(again, undisturbed, strict=True))
    kills = iter(range(1000))
    *kept, last = spans(path, config)
    assert (last.step, last.reason) == ("decode", "killed")
    assert [one.span for one in kept] == [one.span for one in undisturbed[: len(kept)]]


def test_pipes_and_broken_links_are_unreadable(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    write_clip(folder / "good.mp4", 1.2)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "link.mp4").symlink_to("nowhere.mp4")
    counts = build_dataset([str(folder)], str(tmp_path / "out"), CONFIG, progress=lambda *_: None)
    assert (counts["sources"], counts["accepted"], counts["rejects_by_reason"]) == (3, 1, {"unreadable": 2})


def test_missing_ffmpeg_ends_the_run(tmp_path, monkeypatch):
    write_clip(tmp_path / "good.mp4", 1.2)
    (source,) = find_sources([str(tmp_path / "good.mp4")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InfrastructureError, match="install ffmpeg"):
        list(process_source(source, CONFIG, build_encoders(CONFIG)))


# ----------------------------------------------------------------------------------------------------------------- disk


def cli(*words: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "workflows.cli", *words]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MFCTL_TRACKER": "json", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


@needs_util_linux
@pytest.mark.slow
def test_full_disk_ends_the_run_and_the_same_command_resumes(tmp_path):
    """A limit on file sizes acts as a full disk: the second unit does not fit."""
    (tmp_path / "media").mkdir()
    write_clip(tmp_path / "media" / "a.mp4", 1.2)
    write_clip(tmp_path / "media" / "b.mp4", 30.0)
    sets = ("--set", "workers=0", "--set", "sources_per_unit=1", "--set", "window_seconds=1")
    command = ("preprocess", str(tmp_path / "media"), str(tmp_path / "out"), *sets)
    here = {"MFCTL_CWD": str(tmp_path)}
    full = cli(*command, before=("prlimit", "--fsize=250000"), **here)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no space is left" in errors[0] and "same command again" in errors[0]
    assert len(list((tmp_path / "out" / "_done").iterdir())) == 1
    assert cli(*command, **here).returncode == 0
    assert inspect_dataset(str(tmp_path / "out"), verify=True)["accepted"] == 31
    assert not list((tmp_path / "out").rglob(".tmp-*"))


@pytest.mark.slow
def test_full_disk_ends_a_run_on_ray(tmp_path):
    """Use a file system of 300 KB, then a larger one."""
    (tmp_path / "media").mkdir()
    write_clip(tmp_path / "media" / "a.mp4", 1.2)
    write_clip(tmp_path / "media" / "b.mp4", 30.0)
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        config = replace(CONFIG, workers=2, sources_per_unit=1)
        with pytest.raises(InfrastructureError, match=r"no space is left.*same command again"):
            build_dataset([str(tmp_path / "media")], str(disk / "out"), config, progress=lambda *_: None)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        build_dataset([str(tmp_path / "media")], str(disk / "out"), config, progress=lambda *_: None)
        assert inspect_dataset(str(disk / "out"), verify=True)["accepted"] == 31
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_only_scratch_folders_of_dead_processes_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_dir() as folder:
        gone = folder.with_name(folder.name.replace(f"-{os.getpid()}-", "-4194999-"))
        for stays in (gone, tmp_path / "mfctl-notes", tmp_path / "mfctl-0000abcd-1-2-other-machine"):
            stays.mkdir()
        delete_stale_scratch()
        assert folder.is_dir() and not gone.exists()
        assert sorted(p.name[:9] for p in tmp_path.iterdir() if p != folder) == ["mfctl-000", "mfctl-not"]
    assert not folder.exists()
