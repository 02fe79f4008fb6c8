"""Progress on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

ProgressCallback = Callable[[int, int], None]
"""Called as ``progress(done, total)``."""


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """Position of a training stage, and its latest numbers as text."""

    stage: str
    step: int
    steps: int  # of the whole stage
    text: str

    def __str__(self) -> str:
        return f"{self.stage} {self.step}/{self.steps}  {self.text}".rstrip()


@contextmanager
def progress_bar(label: str, *, every: float = 5.0) -> Generator[ProgressCallback]:
    """Yield a callback that draws a bar on a terminal, or prints a line every `every` seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, of: bar.update(task, completed=done, total=of)
    else:
        yield _plain_lines(label, every)


@contextmanager
def training_progress() -> Generator[Callable[[ProgressEvent | str], None]]:
    """Yield a function that shows entries of a training log: events as a bar on a terminal, all as lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda entry: print(entry, file=sys.stderr, flush=True)
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

        def show(entry: ProgressEvent | str) -> None:
            if isinstance(entry, ProgressEvent):
                bar.update(task, description=entry.stage, completed=entry.step, total=entry.steps)
                live.update(Group(bar, Text(entry.text)))
            else:
                console.print(Text(entry))  # above the bar

        yield show


def _plain_lines(label: str, every: float) -> ProgressCallback:
    last = time.monotonic()

    def show(done: int, of: int) -> None:
        nonlocal last
        if done == of or time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{label}: {done} of {of}", file=sys.stderr, flush=True)

    return show
