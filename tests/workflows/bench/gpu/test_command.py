"""Run `mfctl bench gpu` with small processes as parts: time limits, failures, JSON lines, continuation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflows.bench.gpu import command, plan, results
from workflows.bench.gpu.command import bench_gpu
from workflows.bench.gpu.plan import PARTS, Part, finished_cases, select_parts, time_limit
from workflows.bench.gpu.results import MAX_FILE_BYTES, ResultFolder
from workflows.bench.gpu.targets import TARGETS, check_targets

ROOT = Path(__file__).resolve().parents[4]
SETTINGS = {"device": "cpu", "preset": None}
WORKER = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
def report(case, status, **more):
    print(json.dumps({"case": case, "status": status, **more}), flush=True)
for case in ("one", "two"):
    if case in options["--done"].split(","):
        continue
    report(case, "started")
"""
DONE = '    report(case, "done", result={"value": 1.5}, seconds=0.1)\n'
OUTCOMES = {
    "good": DONE,
    "crash": '    if case == "one": os._exit(7)\n' + DONE,
    "hang": '    if case == "two": time.sleep(60)\n' + DONE,
    "broken": "raise SystemExit('no such library')\n",
    "bare": '    report("device", "skipped", reason="no CUDA device")\n    sys.exit(4)\n',
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Return a function that replaces the parts by scripts with the named outcomes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.2)

    def install(*outcomes):
        for outcome in outcomes:
            (tmp_path / f"part_{outcome}.py").write_text(
                OUTCOMES[outcome] if outcome == "broken" else WORKER + OUTCOMES[outcome]
            )
        made = tuple(Part(name=o, module=f"part_{o}", share=1) for o in outcomes)
        monkeypatch.setattr(plan, "PARTS", made)

    return install


def run(out, minutes=0.5):
    return bench_gpu(out=str(out), minutes=minutes, device="cpu")


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_results_are_stored_as_lines_and_as_a_summary(parts, tmp_path):
    parts("good")
    result = run(tmp_path / "out")
    assert result["complete"] and result["done"] == 2 and result["problems"] == []
    assert lines(tmp_path / "out")[0]["result"] == {"value": 1.5}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(result["files"])
    assert len(result["files"]) <= 8
    assert "one: value 1.5" in (tmp_path / "out" / "summary.txt").read_text()
    assert json.loads(json.dumps(result)) == result


def test_the_same_command_runs_only_what_is_missing(parts, tmp_path):
    parts("good")
    run(tmp_path / "out")
    before = len(lines(tmp_path / "out"))
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"part": "good", "case": "thr')  # cut by a stopped machine
    result = run(tmp_path / "out")
    assert result["complete"] and result["done"] == 2
    new = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()[before + 1 :]]
    assert [record["case"] for record in new] == ["process"]


def test_a_crash_costs_its_case_only(parts, tmp_path):
    parts("crash", "good")
    result = run(tmp_path / "out")
    assert (result["done"], result["failed"]) == (3, 1) and not result["complete"]
    assert result["problems"] == [
        "crash one: failed: the process ended with exit code 7: --- crash: -m part_crash "
        + result["problems"][0].split("part_crash ")[1]
    ]


def test_a_part_that_hangs_is_stopped_at_its_limit(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(plan, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(command, "START_SECONDS", 0.5)
    parts("hang", "good")
    result = run(tmp_path / "out", minutes=5 / 60)
    assert result["done"] == 3 and result["cut"] == 1 and not result["complete"]
    assert result["problems"][0].startswith("hang two: cut: stopped at the limit of ")
    assert result["seconds"] < 8


def test_a_part_without_its_libraries_names_the_cause(parts, tmp_path):
    parts("broken", "good")
    result = run(tmp_path / "out")
    assert result["problems"] == ["broken process: failed: the process ended with exit code 1: no such library"]
    assert result["done"] == 2


def test_without_a_device_the_other_parts_are_skipped_at_once(parts, tmp_path):
    parts("bare", "good")
    result = run(tmp_path / "out")
    assert result["problems"] == [f"{part} device: skipped: no CUDA device" for part in ("bare", "good")]
    assert result["failed"] == 0 and not result["complete"]


def test_other_settings_and_other_folders_are_rejected(tmp_path):
    ResultFolder(tmp_path / "out", SETTINGS)
    with pytest.raises(ValueError, match="results with device cpu, preset None, and this command has device cuda"):
        ResultFolder(tmp_path / "out", {"device": "cuda", "preset": None})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no results"):
        ResultFolder(tmp_path / "other", SETTINGS)
    with pytest.raises(ValueError, match="--out must name a folder"):
        ResultFolder(tmp_path / "other" / "notes.txt", SETTINGS)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minutes": 0}, "--minutes 0"), ({"minutes": 1, "parts": ["stram"]}, "unknown part 'stram'. Choose from facts")],
)
def test_wrong_options_write_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench_gpu(out=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_files_stay_small(tmp_path, monkeypatch):
    folder = ResultFolder(tmp_path / "out", SETTINGS)
    folder.append({"part": "a", "case": "b", "status": "done", "result": {"text": "x" * 300_000}})
    (record,) = folder.records()
    assert record["status"] == "failed" and "too long" in record["reason"]
    monkeypatch.setattr(results, "MAX_FILE_BYTES", 1000)
    (tmp_path / "out" / "log.txt").write_text("early\n" * 1000 + "late\n")
    folder.limit_log()
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < 1000 and log.endswith("late\n") and log.startswith("(start of the log removed)")
    assert MAX_FILE_BYTES < 16 << 20


def test_time_is_shared_by_value_and_never_exceeded():
    total, limits = 480.0, []
    left = total
    for number in range(len(PARTS)):
        limits.append(time_limit(PARTS[number:], left))
        left -= limits[-1]
    assert sum(limits) <= total and min(limits) >= 20
    assert limits[2] == max(limits)  # streaming
    assert time_limit(PARTS, 10.0) == pytest.approx(5.0) and time_limit(PARTS, 2.0) == 0
    assert select_parts(["stream", "facts"]) == (PARTS[0], PARTS[2])


def test_failed_and_cut_cases_are_missing():
    records = [{"part": "p", "case": c, "status": c} for c in ("done", "failed", "cut", "skipped")]
    assert finished_cases([*records, {"part": "q", "case": "x", "status": "done"}], "p") == ("done",)


def test_targets_are_compared_with_the_results():
    case = lambda name, **result: {"part": "stream", "case": name, "status": "done", "result": result}
    found = check_targets(
        [
            case("full 192x336 graphs", fps=150.0, first_chunk_s=0.4, late_over_early=1.01),
            case("full 192x336 eager", fps=100.0),
        ]
    )
    assert found.keys() == TARGETS.keys()
    assert found["frames per second at 192x336"] == {"target": 60.0, "measured": 150.0, "met": True}
    assert found["first chunk in seconds"]["met"] is False
    assert found["speed-up of graphs"]["measured"] == 1.5
    assert found["MFU of base, joint"] == {"target": 0.45, "measured": None, "met": None}


def test_the_command_needs_no_torch(tmp_path):
    """The parts name what is missing; each part is a process."""
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "workflows.cli", "bench", "gpu", "--json", "--parts", "facts"]
        + ["--minutes", "1", "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert done.returncode == 1 and result["failed"] == 1
    assert "No module named 'torch'" in result["problems"][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_on_the_cpu_finishes_every_part(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "workflows.cli", "bench", "gpu", "--json", "--device", "cpu", "--preset", "tiny"]
        + ["--minutes", "12", "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["complete"] and result["failed"] == 0, result["problems"]
    assert {record["part"] for record in lines(tmp_path / "out") if record["status"] == "done"} == {
        part.name for part in PARTS
    }
    assert all("need" in problem or "takes minutes" in problem or "take" in problem for problem in result["problems"])
