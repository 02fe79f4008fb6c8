"""How a verb speaks: progress, its result on standard output, its error as one message on standard error, exit code.

0 done, 1 failed, 2 wrong usage or wrong input.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn

import typer
import yaml

Progress = Callable[[int, int], None]
"""Called as ``progress(done, in all)``."""

FAILED, WRONG_INPUT = 1, 2
INPUT_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
TRACEBACK = "MFCTL_TRACEBACK"
"""Set this variable to see where an input error was raised."""


def run(
    work: Callable[[], Any],
    *,
    as_json: bool,
    render: Callable[[Any], str] | None = None,
    code: Callable[[Any], int] | None = None,
) -> None:
    """Do ``work``, print what it returns, and end the process with the contract's exit code if that is not 0.

    ``render`` makes the text for people (default: YAML), ``code`` the exit code of work that was done (default: 0).

    ``as_json``: standard output holds exactly one line, a JSON object; everything else that anything prints meanwhile,
    native libraries and child processes included, goes to standard error.
    """
    try:
        if as_json:
            with standard_output_to_error():
                result = work()
        else:
            result = work()
    except KeyboardInterrupt:
        fail("interrupted; the same command resumes", FAILED, as_json=as_json)
    except Exception as error:
        fail(*explain(error), as_json=as_json)
    else:
        emit(result, as_json=as_json, render=render)
        if code is not None and code(result):
            raise typer.Exit(code(result))


def explain(error: Exception) -> tuple[str, int]:
    """The message for the user and the exit code. A failure that is no input error shows its traceback, unless its
    message says what to do about it."""
    wrong_input = isinstance(error, INPUT_ERRORS) and not _from_ray_worker(error)
    if not (wrong_input or _is_outage(error)) or os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return str(error) or type(error).__name__, WRONG_INPUT if wrong_input else FAILED


def _from_ray_worker(error: Exception) -> bool:
    """Ray gives the error of a worker the worker's type too; input is refused before any worker starts."""
    ray_errors = sys.modules.get("ray.exceptions")  # not imported: then it cannot be one
    return ray_errors is not None and isinstance(error, ray_errors.RayError)


def _is_outage(error: Exception) -> bool:
    """A full disk, an object store that is away."""
    outage = sys.modules.get("preprocessing.outage")  # not imported: then it cannot be one
    return outage is not None and isinstance(error, outage.Outage)


def fail(message: str, code: int, *, as_json: bool) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    raise typer.Exit(code)


def emit(result: Any, *, as_json: bool, render: Callable[[Any], str] | None = None) -> None:
    """One JSON line, or the same as readable text."""
    if as_json:
        print(json.dumps(plain(result)), flush=True)
    elif render is not None:
        print(render(result), flush=True)
    else:
        print(yaml.safe_dump(plain(result), sort_keys=False, allow_unicode=True, width=120), end="", flush=True)


def plain(value: Any) -> Any:
    """The value in JSON's types: paths as text, dataclasses as objects, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


@contextmanager
def progress(label: str, *, every: float = 5.0) -> Generator[Progress]:
    """How far long work has come: a bar on a terminal, a plain line every few seconds elsewhere. On standard error."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
    else:
        yield _plain_lines(label, every)


_STEP = re.compile(r"(\w+) (\d+)/(\d+)  (.*)")
"""A line about a step, as ``workflows.training.meter.line`` writes it."""


@contextmanager
def training_display() -> Generator[Callable[[str], None]]:
    """Shows lines of a training's log on standard error: with a bar on a terminal, elsewhere as they are."""
    if not sys.stderr.isatty():
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = bar.add_task("starting", total=None)
    console = Console(stderr=True)
    with Live(bar, console=console, refresh_per_second=4) as live:

        def show(text: str) -> None:
            if step := _STEP.fullmatch(text):
                stage, done, steps, rest = step.groups()
                bar.update(task, description=stage, completed=int(done), total=int(steps))
                live.update(Group(bar, Text(rest)))
            else:
                console.print(Text(text))  # above the bar

        yield show


def _plain_lines(label: str, every: float) -> Progress:
    last = time.monotonic()

    def show(done: int, of: int) -> None:
        nonlocal last
        if done == of or time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{label}: {done} of {of}", file=sys.stderr, flush=True)

    return show


@contextmanager
def standard_output_to_error() -> Generator[None]:
    """Point file descriptor 1 at standard error: also catches native code, child processes and Ray's worker logs."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
