import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

ProgressCallback = Callable[[int, int], None]
"""Called as ``progress(done, in all)``."""


@contextmanager
def progress_bar(label: str, *, every: float = 5.0) -> Generator[ProgressCallback]:
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
def training_progress() -> Generator[Callable[[str], None]]:
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


def _plain_lines(label: str, every: float) -> ProgressCallback:
    last = time.monotonic()

    def show(done: int, of: int) -> None:
        nonlocal last
        if done == of or time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{label}: {done} of {of}", file=sys.stderr, flush=True)

    return show
