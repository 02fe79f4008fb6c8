"""Loader of the clips of one rank: each row group is read once per epoch, before its clips are needed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from workflows.data.batch_sampler import BucketBatchSampler, IntArray, ShuffleWindow

C = TypeVar("C")
LoadFn = Callable[[Sequence[int]], Sequence[Callable[[], C]]]
"""Reads clips of one row group together; returns one function per clip that decodes it."""


@dataclass(frozen=True, kw_only=True)
class _RankWindow:
    """Clips of a shuffle window that one rank needs."""

    window: ShuffleWindow
    own: IntArray  # (M, rows) tickets
    step_of: Mapping[int, int]  # own ticket -> step
    tickets_of: Mapping[int, list[int]]  # row group -> tickets to keep of it, in the order of first use


class RowGroupLoader(Generic[C]):
    """Loader of the clips in ``rows`` of every batch.

    While the batches of one window are used, the next window is read at the same pace. A rank thus buffers about one
    window of its clips, in stored form. It also keeps clips of a row group that a later window uses, of any rank (less
    than a batch per bucket), so no row group is read twice. Steps may be loaded in any order, but a jump reads again.
    """

    def __init__(self, load: LoadFn[C], sampler: BucketBatchSampler, rows: slice) -> None:
        self._load = load
        self._sampler = sampler
        self._rows = rows
        self._buffer: dict[int, Callable[[], C]] = {}
        self._windows: list[_RankWindow] = []  # the current and the next one
        self._groups_ahead = 0  # row groups of the next window that are read

    @property
    def num_buffered(self) -> int:
        """Number of clips in memory."""
        return len(self._buffer)

    def load_step(self, step: int) -> list[C]:
        """Return the clips of this rank's rows at ``step``."""
        current, upcoming = self._windows_around(step)
        tickets = current.own[step - current.window.first]
        for group in self._sampler.row_group_index(tickets).tolist():
            self._read(current, group, step)
        clips = [self._buffer.pop(ticket)() for ticket in tickets.tolist()]
        self._read_ahead(current, upcoming, step + 1)
        return clips

    def _windows_around(self, step: int) -> list[_RankWindow]:
        """Return the windows of ``step`` and after it; drop buffered clips that no window needs."""
        if not self._windows or step not in self._windows[0].window.steps:
            known = [w for w in self._windows[1:] if step in w.window.steps]
            current = known[0] if known else self._make_window(step)
            self._windows = [current, self._make_window(current.window.steps.stop)]
            self._groups_ahead = 0
            needed = set(current.step_of) | set(current.window.carried_over.tolist())
            self._buffer = {ticket: clip for ticket, clip in self._buffer.items() if ticket in needed}
        return self._windows

    def _make_window(self, step: int) -> _RankWindow:
        window = self._sampler.window(step)
        own = window.tickets[:, self._rows]
        tickets_of: dict[int, list[int]] = {g: [] for g in self._sampler.row_group_index(own.ravel()).tolist()}
        tickets = np.concatenate([own.ravel(), window.carried_over])
        for ticket, group in zip(tickets.tolist(), self._sampler.row_group_index(tickets).tolist(), strict=True):
            if group in tickets_of:
                tickets_of[group].append(ticket)
        steps = np.repeat(np.array(window.steps), own.shape[1])
        step_of = dict(zip(own.ravel().tolist(), steps.tolist(), strict=True))
        return _RankWindow(window=window, own=own, step_of=step_of, tickets_of=tickets_of)

    def _read(self, window: _RankWindow, group: int, step: int) -> None:
        """Read the clips of a row group that ``step`` or a later one needs, unless they are buffered."""
        tickets = [t for t in window.tickets_of[group] if window.step_of.get(t, step) >= step]
        if any(t not in self._buffer for t in tickets):
            clips = self._load(self._sampler.clip_index(np.array(tickets)).tolist())
            self._buffer.update(zip(tickets, clips, strict=True))

    def _read_ahead(self, current: _RankWindow, upcoming: _RankWindow, step: int) -> None:
        """Read some row groups of the next window, so that all are buffered when it begins."""
        missing = list(upcoming.tickets_of)[self._groups_ahead :]
        due = math.ceil(len(missing) / (current.window.steps.stop - step + 1))
        for group in missing[:due]:
            # a row group that both windows use is read once, with the clips of both
            self._read(current if group in current.tickets_of else upcoming, group, step)
        self._groups_ahead += due
