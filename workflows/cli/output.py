"""How a verb speaks: progress, its result on standard output, its error as one message on standard error, exit code.

0 done, 1 failed, 2 wrong usage or wrong input.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn

import typer
import yaml

from preprocessing.io.errors import InfrastructureError

FAILED, WRONG_INPUT = 1, 2
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
TRACEBACK = "MFCTL_TRACEBACK"
"""Set this variable to see where an input error was raised."""


def run_command(
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
            with redirect_stdout_to_stderr():
                result = work()
        else:
            result = work()
    except KeyboardInterrupt:
        exit_with_error("interrupted; the same command resumes", FAILED, as_json=as_json)
    except Exception as error:
        exit_with_error(*describe_error(error), as_json=as_json)
    else:
        print_result(result, as_json=as_json, render=render)
        if code is not None and code(result):
            raise typer.Exit(code(result))


def describe_error(error: Exception) -> tuple[str, int]:
    """The message for the user and the exit code. A failure that is no input error shows its traceback, unless its
    message says what to do about it."""
    wrong_input = isinstance(error, USER_ERRORS) and not _from_ray_worker(error)
    if not (wrong_input or isinstance(error, InfrastructureError)) or os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return str(error) or type(error).__name__, WRONG_INPUT if wrong_input else FAILED


def _from_ray_worker(error: Exception) -> bool:
    """Return True for the error of a Ray worker, which is a failure whatever its type.

    Ray raises a class derived from both RayError and the class of the error in the worker. RayError is compared by
    name: importing ray takes seconds, and most commands run without it.
    """
    return any((kind.__module__, kind.__name__) == ("ray.exceptions", "RayError") for kind in type(error).__mro__)


def exit_with_error(message: str, code: int, *, as_json: bool) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    raise typer.Exit(code)


def print_result(result: Any, *, as_json: bool, render: Callable[[Any], str] | None = None) -> None:
    """One JSON line, or the same as readable text."""
    if as_json:
        print(json.dumps(to_json_types(result)), flush=True)
    elif render is not None:
        print(render(result), flush=True)
    else:
        print(yaml.safe_dump(to_json_types(result), sort_keys=False, allow_unicode=True, width=120), end="", flush=True)


def to_json_types(value: Any) -> Any:
    """The value in JSON's types: paths as text, dataclasses as objects, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_json_types(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): to_json_types(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json_types(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


@contextmanager
def redirect_stdout_to_stderr() -> Generator[None]:
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
