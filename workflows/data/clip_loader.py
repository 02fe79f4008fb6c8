"""Clips of one rank on their way from row groups to batches: each group is read once per epoch, ahead of its use."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from workflows.data.batch_sampler import BucketBatchSampler, IntArray, ShuffleWindow

C = TypeVar("C")
LoadFn = Callable[[Sequence[int]], Sequence[Callable[[], C]]]
"""Reads clips of one row group at once; what it gives for each of them decodes the clip when called."""


@dataclass(frozen=True, kw_only=True)
class _Portion:
    """What a rank needs of a window."""

    window: ShuffleWindow
    own: IntArray  # (M, rows) tickets
    step_of: Mapping[int, int]  # own ticket -> step
    readings: Mapping[int, list[int]]  # reading -> tickets to take from it, in the order of first need


class RowGroupLoader(Generic[C]):
    """The clips of ``rows`` of every batch.

    While one window is used up the next one is read at the same pace, so a rank holds about one window of its clips, as
    they are stored. Of a row group it also keeps the clips that wait for a later window, its own or not (less than a
    batch per bucket), which is why nothing is read twice. Asking for another step than the next one is allowed, but
    reads anew.
    """

    def __init__(self, load: LoadFn[C], order: BucketBatchSampler, rows: slice) -> None:
        self._load, self._order, self._rows = load, order, rows
        self._held: dict[int, Callable[[], C]] = {}
        self._portions: list[_Portion] = []  # the one that is used up, and the next
        self._ahead = 0  # readings of the next portion that are done

    @property
    def num_buffered(self) -> int:
        """Clips in memory."""
        return len(self._held)

    def load_step(self, step: int) -> list[C]:
        """The clips of this rank's rows at a step."""
        now, coming = self._around(step)
        tickets = now.own[step - now.window.first]
        for reading in self._order.row_group_index(tickets).tolist():
            self._read(now, reading, step)
        clips = [self._held.pop(ticket)() for ticket in tickets.tolist()]
        self._read_ahead(now, coming, step + 1)
        return clips

    def _around(self, step: int) -> list[_Portion]:
        """The portion of a step and the one after it; what neither they nor later ones need is let go."""
        if not self._portions or step not in self._portions[0].window.steps:
            now = next((p for p in self._portions[1:] if step in p.window.steps), None) or self._portion(step)
            self._portions, self._ahead = [now, self._portion(now.window.steps.stop)], 0
            wanted = set(now.step_of) | set(now.window.carried_over.tolist())
            self._held = {ticket: clip for ticket, clip in self._held.items() if ticket in wanted}
        return self._portions

    def _portion(self, step: int) -> _Portion:
        window = self._order.window(step)
        own = window.tickets[:, self._rows]
        readings: dict[int, list[int]] = {reading: [] for reading in self._order.row_group_index(own.ravel()).tolist()}
        tickets = np.concatenate([own.ravel(), window.carried_over])
        for ticket, reading in zip(tickets.tolist(), self._order.row_group_index(tickets).tolist(), strict=True):
            if reading in readings:
                readings[reading].append(ticket)
        steps = np.repeat(np.array(window.steps), own.shape[1])
        step_of = dict(zip(own.ravel().tolist(), steps.tolist(), strict=True))
        return _Portion(window=window, own=own, step_of=step_of, readings=readings)

    def _read(self, portion: _Portion, reading: int, step: int) -> None:
        """Have the clips of a row group that are needed from ``step`` on."""
        tickets = [t for t in portion.readings[reading] if portion.step_of.get(t, step) >= step]
        if any(t not in self._held for t in tickets):
            made = self._load(self._order.clip_index(np.array(tickets)).tolist())
            self._held.update(zip(tickets, made, strict=True))

    def _read_ahead(self, now: _Portion, coming: _Portion, step: int) -> None:
        """Read some of the next portion: at this pace all of it is there by the time that it is needed."""
        waiting = list(coming.readings)[self._ahead :]
        due = math.ceil(len(waiting) / (now.window.steps.stop - step + 1))
        for reading in waiting[:due]:
            if reading in now.readings:  # clips held over from a row group that this window may be yet to read
                self._read(now, reading, step)
            else:
                self._read(coming, reading, step)
        self._ahead += due
