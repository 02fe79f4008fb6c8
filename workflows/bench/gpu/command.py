"""Run all measurements for a GPU, part by part (``mfctl bench gpu``). Imports no torch: every part is a process.

A part that fails, hangs or loses its device thus costs its own time only. Results are in ``results.ResultFolder``.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypedDict

from mfcore.errors import check_range
from workflows.bench.gpu.plan import GRACE_SECONDS, START_SECONDS, Part, finished_cases, select_parts, time_limit
from workflows.bench.gpu.results import FILES, LOG_FILE, SUMMARY_FILE, ResultFolder
from workflows.bench.gpu.summary import format_summary
from workflows.bench.gpu.targets import TargetResult, check_targets

MAX_MINUTES = 600
MAX_RESTARTS = 3  # of one part, after crashes of its process
NO_DEVICE = 4  # exit code of a worker without its device
ROOT = Path(__file__).resolve().parents[3]


class GpuBenchResult(TypedDict):
    """Result of ``mfctl bench gpu``, as printed by ``--json``."""

    out: str
    device: str
    preset: str | None  # None: the presets of each part
    seconds: float  # of this command
    complete: bool  # False: the same command continues
    done: int  # cases
    skipped: int  # cases that cannot run on this machine
    cut: int  # cases without enough time
    failed: int
    problems: list[str]  # one line for each case that is not done
    targets: dict[str, TargetResult]
    files: list[str]


def bench_gpu(
    *, out: str, minutes: float, device: str = "cuda", preset: str | None = None, parts: Sequence[str] | None = None
) -> GpuBenchResult:
    """Run the missing cases of all parts within ``minutes``; the same call continues.

    ``preset``: network for all parts, in place of ``full`` and ``base``. Raises UserInputError for wrong options.
    """
    check_range("--minutes", minutes, 0, MAX_MINUTES, above=True)
    selected = select_parts(parts)
    folder = ResultFolder(Path(out), {"device": device, "preset": preset})
    started = time.monotonic()
    deadline = started + 60 * minutes
    missing = ""
    for number, part in enumerate(selected):
        if missing:
            folder.append({"part": part.name, "case": "device", "status": "skipped", "reason": missing})
            _log(f"{part.name}: skipped: {missing}")
            continue
        run = PartRun(folder=folder, part=part, device=device, preset=preset)
        run.run(time.monotonic() + time_limit(selected[number:], deadline - time.monotonic()))
        missing = run.missing_device
        folder.limit_log()
    result = summarize(folder, device=device, preset=preset, seconds=time.monotonic() - started)
    folder.write_summary(format_summary(folder.latest(), result["targets"], result["problems"]))
    return result


@dataclass(kw_only=True)
class PartRun:
    """One part of this command. Mutable: its process may be started again for the remaining cases."""

    folder: ResultFolder
    part: Part
    device: str
    preset: str | None
    missing_device: str = ""  # why the device cannot be used
    running: str | None = None  # case in progress
    excluded: list[str] = field(default_factory=list[str])  # cases that ended a process
    lines: int = 0  # from the current process

    def run(self, deadline: float) -> None:
        """Run the missing cases until ``deadline``, in time.monotonic() seconds."""
        for _ in range(1 + MAX_RESTARTS):
            left = deadline - time.monotonic()
            if left < START_SECONDS:
                self._record("process", "cut", f"{max(0.0, left):.0f} s are left for this part")
                return
            code = self._run_process(left)
            if code == 0:
                self.folder.append({"part": self.part.name, "case": "process", "status": "done"})
            if code in (0, NO_DEVICE):
                return
            if code is None:
                self._record(self.running or "process", "cut", f"stopped at the limit of {left:.0f} s of this part")
                return
            reason = f"the process ended with exit code {code}: {self._last_log_line()}"
            self._record(self.running or "process", "failed", reason)
            if self.running is None and not self.lines:
                return  # it fails at its start
            self.excluded += [self.running] if self.running else []

    def _run_process(self, seconds: float) -> int | None:
        """Run one process; return its exit code, None if it was stopped at the limit."""
        done = [*finished_cases(self.folder.records(), self.part.name), *self.excluded]
        command = [sys.executable, "-m", self.part.module, *self.part.arguments]
        command += ["--device", self.device, "--seconds", f"{seconds:.1f}", "--done", ",".join(done)]
        command += ["--preset", self.preset] if self.preset else []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.running, self.lines = None, 0
        with (self.folder.path / LOG_FILE).open("a") as log:
            log.write(f"--- {self.part.name}: {' '.join(command[1:])}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                process_group=0,  # with the compiler processes of torch
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
            reader.start()
            try:
                return process.wait(seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                reader.join(GRACE_SECONDS)

    def _read(self, stream: TextIO) -> None:
        """Store the lines of the process as they arrive."""
        for line in stream:
            try:
                report = json.loads(line)
                case, status = str(report["case"]), str(report["status"])
            except (ValueError, TypeError, KeyError):
                continue  # cut by the end of the process
            self.lines += 1
            if status == "started":
                self.running = case
                continue
            self.running = None
            if status == "skipped" and case == "device":
                self.missing_device = str(report.get("reason"))
            self._store(report)

    def _record(self, case: str, status: str, reason: str) -> None:
        self._store({"case": case, "status": status, "reason": reason})

    def _store(self, report: dict[str, Any]) -> None:
        self.folder.append({"part": self.part.name, **report, "at": round(time.time(), 1)})
        outcome = f"{report['seconds']:.1f} s" if report["status"] == "done" else f"{report.get('reason')}"
        _log(f"{self.part.name} {report['case']}: {report['status']}: {outcome}")

    def _last_log_line(self) -> str:
        text = (self.folder.path / LOG_FILE).read_text(errors="replace")[-4000:]
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def summarize(folder: ResultFolder, *, device: str, preset: str | None, seconds: float) -> GpuBenchResult:
    """Return what ``--json`` prints, from the latest line of every case."""
    latest = folder.latest()
    count = {status: sum(r.get("status") == status for r in latest) for status in ("done", "skipped", "cut", "failed")}
    problems = [
        f"{r['part']} {r['case']}: {r['status']}: {r.get('reason')}" for r in latest if r.get("status") != "done"
    ]
    return {
        "out": str(folder.path),
        "device": device,
        "preset": preset,
        "seconds": round(seconds, 1),
        "complete": count["done"] > 0
        and count["cut"] == count["failed"] == 0
        and not any(r.get("case") == "device" for r in latest),
        "done": count["done"],
        "skipped": count["skipped"],
        "cut": count["cut"],
        "failed": count["failed"],
        "problems": problems,
        "targets": check_targets(latest),
        "files": [name for name in FILES if name == SUMMARY_FILE or (folder.path / name).exists()],
    }


def format_table(result: GpuBenchResult) -> str:
    """Return the summary of the folder."""
    return (Path(result["out"]) / SUMMARY_FILE).read_text().rstrip()


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
