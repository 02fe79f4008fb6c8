"""Output of commands: the result on standard output, one error message on standard error, the exit code.

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
"""Variable that adds the traceback to input errors."""


def run_command(
    work: Callable[[], Any],
    *,
    as_json: bool,
    render: Callable[[Any], str] | None = None,
    code: Callable[[Any], int] | None = None,
) -> None:
    """Run ``work``, print its result and exit with its code.

    Args:
        work: function of the command; it imports the libraries that the command needs.
        as_json: print exactly one line on standard output, a JSON object; other output, also of native libraries and
            child processes, goes to standard error.
        render: formats the result as text; default: YAML.
        code: exit code of a result; default: 0.
    """
    try:
        if as_json:
            with redirect_stdout_to_stderr():
                result = work()
        else:
            result = work()
    except KeyboardInterrupt:
        exit_with_error("interrupted. Run the same command again to resume", FAILED, as_json=as_json)
    except Exception as error:
        exit_with_error(*describe_error(error), as_json=as_json)
    else:
        print_result(result, as_json=as_json, render=render)
        if code is not None and code(result):
            raise typer.Exit(code(result))


def describe_error(error: Exception) -> tuple[str, int]:
    """Return the message for the user and the exit code.

    Prints the traceback of a failure, unless it is an input error or an infrastructure error: their messages contain
    the fix.
    """
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
    """Print the error, as JSON too with ``as_json``, and exit with the code."""
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}), flush=True)
    raise typer.Exit(code)


def print_result(result: Any, *, as_json: bool, render: Callable[[Any], str] | None = None) -> None:
    """Print the result as one JSON line, or as text."""
    if as_json:
        print(json.dumps(to_json_types(result)), flush=True)
    elif render is not None:
        print(render(result), flush=True)
    else:
        print(yaml.safe_dump(to_json_types(result), sort_keys=False, allow_unicode=True, width=120), end="", flush=True)


def to_json_types(value: Any) -> Any:
    """Convert a value to JSON types: paths to text, dataclasses to objects, non-finite numbers to null."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_json_types(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json_types(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


@contextmanager
def redirect_stdout_to_stderr() -> Generator[None]:
    """Redirect file descriptor 1 to standard error, for native code, child processes and Ray's worker logs too."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
