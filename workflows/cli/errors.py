"""Translation of exceptions into one message and an exit code.

Wrong input (``UserInputError`` and errors of the file system about a given path) exits with 2, everything else with 1.
The traceback of an internal error goes to a log file that the message names.
"""

import errno
import os
import sys
import tempfile
import traceback

from mfcore.errors import UserInputError
from preprocessing.io.errors import InfrastructureError
from workflows.utils.environment import CWD_ENV, hide_passwords

FAILED, WRONG_INPUT = 1, 2
TRACEBACK = "MFCTL_TRACEBACK"
"""Variable that prints the traceback of every error instead of writing it to a log file."""

_PATH_REMEDIES = {
    errno.ENOENT: "Check the path",
    errno.EEXIST: "Choose another name",
    errno.ENOTDIR: "Choose a path in a folder",
    errno.EISDIR: "Choose a file instead of a folder",
    errno.ENOTEMPTY: "Choose a new or empty folder",
    errno.EACCES: "Change its permissions or choose another place",
    errno.EPERM: "Change its permissions or choose another place",
    errno.ENAMETOOLONG: "Use shorter names",
    errno.ELOOP: "Remove the circular link",
    errno.EROFS: "Choose a place on a file system that can be written",
}
"""Fix of a file system error that depends on the given path."""
_MACHINE_REMEDIES = {
    errno.ENOSPC: "Free space, then run the same command again",
    errno.EDQUOT: "Free space, then run the same command again",
    errno.EFBIG: "Choose a file system that allows larger files",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 65536",
    errno.EIO: "Repair the storage, then run the same command again",
}
"""Fix of a failure of the machine."""
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def describe_error(error: BaseException) -> tuple[str, int]:
    """Return the message for the user and the exit code.

    The traceback of an internal error is written to a log file, which the message names. It is printed instead if the
    variable MFCTL_TRACEBACK is set, in a submitted job (its output is the log), or if no file can be written.
    """
    if os.environ.get(TRACEBACK):
        _print_traceback(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Run the same command again to resume", FAILED
    if not _from_ray_worker(error):
        if isinstance(error, UserInputError):
            return hide_passwords(str(error)), WRONG_INPUT
        if isinstance(error, InfrastructureError):
            return hide_passwords(str(error)), FAILED
        if isinstance(error, OSError) and (described := _describe_os_error(error)):
            return described
    message = _first_line(error)
    return f"{message}{'' if message.endswith('.') else '.'} Traceback: {_store_traceback(error)}", FAILED


def _describe_os_error(error: OSError) -> tuple[str, int] | None:
    """Return message and exit code of a known error of the file system, None for another one."""
    code = WRONG_INPUT if error.errno in _PATH_REMEDIES or isinstance(error, _PATH_ERRORS) else FAILED
    remedy = _PATH_REMEDIES.get(error.errno or 0) or _MACHINE_REMEDIES.get(error.errno or 0)
    if remedy and error.strerror:
        where = f"{_display_path(error.filename)}: " if error.filename is not None else ""
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}. {remedy}.", code
    return (hide_passwords(str(error)), code) if code == WRONG_INPUT and str(error) else None


def _display_path(name: object) -> str:
    """Return the path of an error, shortened in the middle."""
    text = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def _from_ray_worker(error: BaseException) -> bool:
    """Return True for the error of a Ray worker, which is a failure whatever its type.

    Ray raises a class derived from both RayError and the class of the error in the worker. RayError is compared by
    name: importing ray takes seconds, and most commands run without it.
    """
    return any((kind.__module__, kind.__name__) == ("ray.exceptions", "RayError") for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    """Return one line: the message of a failure of this project, or the type and message of another error."""
    cause = getattr(error, "cause", None) if _from_ray_worker(error) else None
    if isinstance(cause, BaseException):
        return f"a Ray worker failed: {_first_line(cause)}"
    lines = [line.strip() for line in hide_passwords(str(error)).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    ours = type(error) is RuntimeError or type(error).__module__.split(".")[0] in (
        "mfcore",
        "preprocessing",
        "workflows",
    )
    if ours and text:
        return text
    return f"internal error {type(error).__name__}{f': {text}' if text else ''}"


def _store_traceback(error: BaseException) -> str:
    """Write the traceback to a new file and return its path; print it if that fails or the output is a log."""
    if os.environ.get(TRACEBACK):
        return "see above"
    if os.environ.get(CWD_ENV):
        _print_traceback(error)
        return "see above"
    try:
        handle, path = tempfile.mkstemp(prefix="mfctl-error-", suffix=".log")
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            file.write(_format_traceback(error))
    except OSError:
        _print_traceback(error)
        return "see above"
    return path


def _print_traceback(error: BaseException) -> None:
    if sys.stderr is not None:
        print(_format_traceback(error), end="", file=sys.stderr, flush=True)


def _format_traceback(error: BaseException) -> str:
    return hide_passwords("".join(traceback.format_exception(error)))
