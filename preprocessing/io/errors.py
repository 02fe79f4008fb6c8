"""Infrastructure errors: failures of storage or the machine that end a run."""

import errno
import sys
from collections.abc import Generator
from contextlib import contextmanager

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_CREDENTIALS = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
_RERUN = "then run the same command again to resume"


class InfrastructureError(RuntimeError):
    """Failure of the machine or its storage, with the remedy in the message."""


@contextmanager
def translate_storage_errors(location: str, hint: str = "", bucket: bool = True) -> Generator[None]:
    """Raise InfrastructureError with a remedy for failures to read or write at `location`.

    A file that is absent, exists already or is forbidden keeps its own error.

    Args:
        location: Path or URI that messages name.
        hint: Added to the remedy for a full disk.
        bucket: Also translate a missing bucket.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if bucket and "(NoSuchBucket)" in str(error.__cause__):
            raise InfrastructureError(f"{location}: no such bucket. Create it, {_RERUN}") from error
        if any(f"({code})" in str(error.__cause__) for code in _BAD_CREDENTIALS):
            raise InfrastructureError(
                f"{location}: the credentials are invalid or expired ({error}). Renew them, {_RERUN}"
            ) from error
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise InfrastructureError(f"{location}: no space is left ({error}). Free some{hint}, {_RERUN}") from error
        raise InfrastructureError(f"{location} cannot be read or written ({error}). Repair it, {_RERUN}") from error
    except Exception as error:
        if not _is_object_storage_error(error):
            raise
        raise InfrastructureError(
            f"{location}: invalid response of the object store ({error}). Wait until it works, {_RERUN}"
        ) from error


def _is_object_storage_error(error: Exception) -> bool:
    """Return True if the client of the object store raised the error; it need not be loaded."""
    core = sys.modules.get("botocore.exceptions")
    parsers = sys.modules.get("botocore.parsers")
    http = sys.modules.get("aiohttp")
    kinds = (core and core.BotoCoreError, parsers and parsers.ResponseParserError, http and http.ClientError)
    return isinstance(error, tuple(kind for kind in kinds if kind))
