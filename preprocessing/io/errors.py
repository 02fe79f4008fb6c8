"""What stops a run and not a clip: a full disk, an object store that is away. Afterwards the same command goes on."""

import errno
import sys
from collections.abc import Generator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNKNOWN_TO_S3 = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
_AGAIN = "then run the same command again: it goes on where it stopped"


class InfrastructureError(RuntimeError):
    """The machine or its storage fails, whichever clip it is. The message says what to do."""


@contextmanager
def translate_storage_errors(place: str, hint: str = "", bucket: bool = True) -> Generator[None]:
    """Errors of reading and writing at ``place`` become Outage with the remedy, to which ``hint`` adds.

    That something is absent, there already or forbidden stays the error that it is; ``bucket`` says whether its absence
    is an outage.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if bucket and "(NoSuchBucket)" in str(error.__cause__):
            raise InfrastructureError(f"{place}: there is no such bucket: make it (again), {_AGAIN}") from error
        if any(f"({code})" in str(error.__cause__) for code in _UNKNOWN_TO_S3):
            raise InfrastructureError(
                f"{place}: the credentials are no longer good ({error}): renew them, {_AGAIN}"
            ) from error
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise InfrastructureError(f"{place}: no space is left ({error}): free some{hint}, {_AGAIN}") from error
        raise InfrastructureError(f"{place} cannot be read or written ({error}): mend that, {_AGAIN}") from error
    except Exception as error:
        if not _of_object_storage(error):
            raise
        raise InfrastructureError(f"{place} does not answer as it should ({error}): when it does, {_AGAIN}") from error


def _of_object_storage(error: Exception) -> bool:
    """Whether the client of the object store raised it; one that was never loaded cannot have."""
    core, parsers, http = (sys.modules.get(name) for name in ("botocore.exceptions", "botocore.parsers", "aiohttp"))
    kinds = (core and core.BotoCoreError, parsers and parsers.ResponseParserError, http and http.ClientError)
    return isinstance(error, tuple(kind for kind in kinds if kind))
