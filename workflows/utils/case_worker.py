"""Cases of a benchmark part, run one after another in a child process that prints a JSON line per case.

Standard output carries the JSON lines only. Other output, also of native code, goes to standard error.

A line has ``case``, ``status`` and ``seconds``. A finished case has its ``result``, another one its ``reason``: failed,
skipped (it cannot run on this machine) or cut (too little time is left).
"""

import argparse
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import torch

STARTED, DONE, SKIPPED, CUT, FAILED = "started", "done", "skipped", "cut", "failed"
DEVICE_LOST = 3  # exit code: the device accepts no work after an error, and a new process is needed
NO_DEVICE = 4  # exit code: no case ran
DEVICE_CASE = "device"  # name in the line of a part that is skipped as a whole
MAX_REASON = 400  # characters


class CaseSkippedError(Exception):
    """A case cannot run on this machine; the message is the reason."""


class OutOfTimeError(Exception):
    """Too little time is left for a case; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Options of one worker process."""

    device: torch.device
    preset: str | None = None  # in place of the presets of the part
    deadline: float = math.inf  # of the part, in time.monotonic() seconds
    done: frozenset[str] = frozenset()  # cases to leave out

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    @property
    def rehearsal(self) -> bool:
        """True on a CPU: few repeats, since the times are not of interest."""
        return self.device.type != "cuda"


@dataclass(frozen=True, kw_only=True)
class BenchCase:
    """One measurement or check of a part."""

    name: str
    run: Callable[[], dict[str, Any]]
    least_seconds: float = 1.0  # cut if less time is left
    needs_cuda: str = ""  # skipped on another device, for this reason


CasesOf = Callable[[WorkerOptions], Iterable[BenchCase]]


def main(cases_of: CasesOf, words: Sequence[str] | None = None, *, needs_device: bool = True) -> int:
    """Parse the options of a worker, run its cases and return the exit code.

    ``needs_device``: run no case without the device.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--preset")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--done", default="", help="names of finished cases, separated by commas")
    given = parser.parse_args(words)
    options = WorkerOptions(
        device=torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu"),
        preset=given.preset,
        deadline=time.monotonic() + given.seconds,
        done=frozenset(filter(None, given.done.split(","))),
    )
    with json_stream() as stream:
        if needs_device and (reason := missing_device(options.device)):
            print(json.dumps({"case": DEVICE_CASE, "status": SKIPPED, "reason": reason}), file=stream)
            return NO_DEVICE
        return run_cases(cases_of(options), options, stream)


def missing_device(device: torch.device) -> str:
    """Return why the device cannot be used, "" if it can."""
    if device.type != "cuda" or torch.cuda.is_available():
        return ""
    built = torch.version.cuda
    cause = f"torch {torch.__version__} is built for CUDA {built} and finds none" if built else "torch has no CUDA"
    return f"no CUDA device: {cause}. For a rehearsal use --device cpu --preset tiny"


@contextmanager
def json_stream() -> Iterator[TextIO]:
    """Yield standard output as a stream of JSON lines; file descriptor 1 becomes standard error."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", buffering=1) as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            stream.flush()
            os.dup2(stream.fileno(), 1)


def run_cases(cases: Iterable[BenchCase], options: WorkerOptions, stream: TextIO) -> int:
    """Run the cases in order; return the exit code. A failed case does not stop the others."""

    def report(case: str, status: str, **more: Any) -> None:
        print(json.dumps({"case": case, "status": status, **more}), file=stream, flush=True)

    for case in cases:
        if case.name in options.done:
            continue
        started = time.monotonic()
        elapsed = lambda started=started: round(time.monotonic() - started, 3)
        try:
            _check(case, options)
            report(case.name, STARTED)
            result = case.run()
        except (CaseSkippedError, OutOfTimeError) as stopped:
            status = SKIPPED if isinstance(stopped, CaseSkippedError) else CUT
            report(case.name, status, reason=str(stopped), seconds=elapsed())
        except Exception as error:
            traceback.print_exc()
            report(case.name, FAILED, reason=describe(error), seconds=elapsed())
        else:
            report(case.name, DONE, result=to_finite(result), seconds=elapsed())
        if not release_memory(options.device):
            return DEVICE_LOST
    return 0


def _check(case: BenchCase, options: WorkerOptions) -> None:
    """Raise CaseSkippedError or OutOfTimeError if the case cannot run."""
    if case.needs_cuda and options.device.type != "cuda":
        raise CaseSkippedError(f"{case.needs_cuda}, and this runs on the {options.device.type}")
    if options.seconds_left < case.least_seconds:
        raise OutOfTimeError(
            f"{max(0.0, options.seconds_left):.0f} s of the part are left, and it needs {case.least_seconds:.0f} s"
        )


def describe(error: Exception) -> str:
    """Return type and message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:MAX_REASON]}" if lines else type(error).__name__


def release_memory(device: torch.device) -> bool:
    """Free the memory of the last case. Returns False if the device accepts no more work."""
    gc.collect()
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    except RuntimeError:
        with suppress(Exception):
            traceback.print_exc()
        return False
    return True


def to_finite(value: Any) -> Any:
    """Return the value with non-finite numbers as None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {str(key): to_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
