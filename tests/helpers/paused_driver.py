"""Pause a preprocessing driver at every point where it writes, let another one finish, and resume the first.

Run as ``python -m tests.helpers.paused_driver KIND MEDIA OUT``. Prints one JSON line per point. Processes are forked
from one interpreter with all imports, which saves seconds per process. KIND is

- ``new``: the first driver has one source and no dataset, the other one has all sources;
- ``damaged``: both repair a dataset with an empty marker, a cut file and the files of an unknown unit.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from preprocessing import runner
from preprocessing.config import PreprocessConfig
from preprocessing.io import lease
from preprocessing.io.storage import Store
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset

LEASE_SECONDS = 0.8
CONFIG = PreprocessConfig(
    workers=0, window_seconds=Fraction(2), sources_per_unit=1, sizes=((32, 32),), keep_duplicates=True
)
LOST = 3  # exit code
UNKNOWN_UNIT = "000009-0123abcd"


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process; return its id. Exit codes: 0, LOST after LeaseLostError, 1 after other errors."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except lease.LeaseLostError:
        code = LOST
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stop_at(point: int, out: Path) -> None:
    """Send SIGSTOP to this process at a point, counted over checks of the lease and changes of files below `out`."""
    count = 0

    def hooked(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            if isinstance(args[0], Store) or str(args[0]).startswith(str(out)):
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGSTOP)
            return real(*args, **kwargs)

        return call

    for name in ("replace", "rename", "link", "unlink", "remove"):
        setattr(os, name, hooked(getattr(os, name)))
    verify = hooked(lease.verify_lease)
    for module in (lease, runner):
        setattr(module, "verify_lease", verify)  # noqa: B010


def build(sources: Path, out: Path) -> None:
    """Build the dataset with short leases and without progress."""
    lease.Lease.__init__.__defaults__ = (LEASE_SECONDS,)
    build_dataset([str(sources)], str(out), CONFIG, progress=_quiet)


def _quiet(*_: object) -> None: ...


def damage(out: Path) -> None:
    """Empty a marker, cut a file, and add the files of a unit that has no sources."""
    empty, cut, _ = sorted((out / "_done").iterdir())
    empty.write_bytes(b"")
    clips = next((out / "clips").glob(f"{cut.stem}*"))
    for target in (out / "clips" / f"{UNKNOWN_UNIT}-32x32.parquet", out / "rejects" / f"{UNKNOWN_UNIT}.parquet"):
        target.parent.mkdir(exist_ok=True)
        shutil.copy(clips, target)
    clips.write_bytes(clips.read_bytes()[:100])


def try_point(point: int, out: Path, media: Path, first_source: Path) -> dict[str, int] | None:
    """Pause the first driver at a point; return the exit codes, None if it ends before that point."""

    def paused() -> None:
        stop_at(point, out)
        build(first_source, out)

    first = fork(paused)
    if not os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1]):
        return None
    time.sleep(LEASE_SECONDS * 1.2)
    second = finish(fork(lambda: build(media, out)))
    os.kill(first, signal.SIGCONT)
    ended = finish(first)
    verified = finish(fork(lambda: inspect_dataset(str(out), verify=True)))
    return {"point": point, "first": ended, "second": second, "verify": verified}


def main(kind: str, media: Path, root: Path) -> None:
    """Try every point until the first driver ends without reaching one."""
    if kind == "damaged":
        finish(fork(lambda: build(media, root / "whole")))
    first_source = min(media.glob("*.mp4")) if kind == "new" else media
    codes: dict[str, int] | None = {"point": 0}
    while codes is not None:
        out = root / str(codes["point"] + 1)
        if kind == "damaged":
            shutil.copytree(root / "whole", out)
            damage(out)
        codes = try_point(codes["point"] + 1, out, media, first_source)
        if codes is not None:
            print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
