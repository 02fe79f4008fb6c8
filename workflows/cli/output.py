"""Output of commands: the result on standard output, one error message on standard error, the exit code.

0 done, 1 failed, 2 wrong usage or wrong input.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from typing import Any, NoReturn

import typer
import yaml

from preprocessing.io.errors import InfrastructureError
from workflows.cli.errors import describe_error


class OutputError(InfrastructureError):
    """Standard output cannot be written."""


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
        print_result(result, as_json=as_json, render=render)
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # the reader has closed the pipe: typer exits silently with 1
        message, exit_code = describe_error(error)
        exit_with_error(message, exit_code, as_json=as_json)
    if code is not None and code(result):
        raise typer.Exit(code(result))


def run_until_stopped(work: Callable[[], None], *, as_json: bool) -> None:
    """Run ``work``, which prints what it has to print, until it is stopped; report its error as ``run_command``."""
    try:
        work()
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise
        message, exit_code = describe_error(error)
        exit_with_error(message, exit_code, as_json=as_json)


def exit_with_error(message: str, code: int, *, as_json: bool) -> NoReturn:
    """Print the error, as JSON too with ``as_json``, and exit with the code."""
    print_error(message)
    print_json_error(message, code, as_json=as_json)
    raise typer.Exit(code)


def print_json_error(message: str, code: int, *, as_json: bool) -> None:
    """Print the error as one JSON line on standard output if ``as_json``."""
    if as_json:
        with suppress(OutputError):
            write_stdout(json.dumps({"error": message, "exit_code": code}) + "\n")


def print_error(message: str) -> None:
    """Print one error message; characters that the terminal cannot encode are escaped."""
    if sys.stderr is None:
        return
    encoding = sys.stderr.encoding or "utf-8"
    printable = f"error: {message}".encode(encoding, "backslashreplace").decode(encoding)
    with suppress(OSError):
        print(printable, file=sys.stderr, flush=True)


def print_result(result: Any, *, as_json: bool, render: Callable[[Any], str] | None = None) -> None:
    """Print the result as one JSON line, or as text. Raises OutputError."""
    if as_json:
        text = json.dumps(to_json_types(result)) + "\n"
    elif render is not None:
        text = render(result) + "\n"
    else:
        text = yaml.safe_dump(to_json_types(result), sort_keys=False, allow_unicode=True, width=120)
    write_stdout(text)


def write_stdout(text: str) -> None:
    """Write and flush ``text``; characters that standard output cannot encode are escaped.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
        OutputError: standard output cannot be written, such as on a full disk.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise OutputError(
            f"cannot write the result to standard output: {error.strerror}. Redirect it elsewhere"
        ) from error


def discard_stdout() -> None:
    """Send what standard output has buffered to the null device: the interpreter flushes it at exit."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def check_stdout() -> None:
    """Raise OutputError if file descriptor 1 is closed: the next opened file would receive the output."""
    if sys.stdout is None:
        raise OutputError("standard output is closed. Redirect it to a file or to /dev/null")


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
