"""Rows of a study to a table, to the bars it is measured by, and to a page of Markdown."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from workflows.study.methods import ABLATION_COUNTS, ABLATIONS, METHODS

Rows = Sequence[Mapping[str, Any]]
SHOWN = (
    "frechet", "valid", "syllable_error", "sync", "offset_ms", "identity_error", "voice_error", "voice_changes",
    "voice_entropy", "entropy", "seam", "lag1", "motion", "loudness", "failed",
)  # fmt: skip
DRIFTING = ("frechet", "identity_error", "voice_error")
EARLY, LATE = "0-5", "15-25"
HARD, GAP, SEAM, USE, DRIFT = 5.0, 0.8, 1.5, 0.8, 0.5  # bars, as numbers


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number over seeds."""

    mean: float
    spread: float  # standard deviation over seeds; 0 for one
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" +- {self.spread:.3f}" if self.seeds > 1 else "")


def over_seeds(values: Iterable[float]) -> Value:
    some = list(values)
    return Value(mean=mean(some), spread=stdev(some) if len(some) > 1 else 0.0, seeds=len(some))


class Table:
    """Metrics by (method, mode, steps, guided, window)."""

    def __init__(self, rows: Rows, costs: Rows) -> None:
        self._made_of = rows, costs
        values: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            key = (row["method"], row["mode"], row["steps"], row["guidance"] != 1.0, row["window"])
            for name, value in row["metrics"].items():
                values[key][name].append(value)
        self._values = {key: {n: over_seeds(v) for n, v in some.items()} for key, some in values.items()}
        grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for cost in costs:
            grouped[cost["method"]].append(cost)
        self.costs = dict(grouped)

    @property
    def order(self) -> list[tuple[Any, ...]]:
        """Keys, method after method as they stand in ``METHODS``."""
        order = ["real", "joint", *METHODS]
        return sorted(self._values, key=lambda k: (order.index(k[0]), k[1], k[3], k[2]))

    def has(self, *key: Any) -> bool:
        return key in self._values

    def seeds(self, *methods: str) -> set[int]:
        """The seeds that any of ``methods`` has rows of."""
        return {row["seed"] for row in self._made_of[0] if row["method"] in methods}

    def trained(self, method: str) -> set[int]:
        """The seeds of its trainings on record."""
        return {cost["seed"] for cost in self.costs.get(method, ())}

    def only(self, seeds: Collection[int]) -> "Table":
        """The same, of some seeds."""
        rows, costs = ([r for r in some if r["seed"] in seeds] for some in self._made_of)
        return Table(rows, costs)

    def get(self, metric: str, method: str, mode: str, steps: int, window: str, *, guided: bool = False) -> Value:
        return self._values[method, mode, steps, guided, window][metric]

    def of(self, *key: Any) -> Mapping[str, Value]:
        """All metrics of one key."""
        return self._values[key]

    def cost(self, method: str, of: Callable[[Mapping[str, Any]], float]) -> Value:
        return over_seeds(of(c) for c in self.costs[method])

    def history_use(self, method: str, modality: str) -> Value:
        """Loss on another clip's history over loss on the clip's own, of the multi-step mode."""
        return self.cost(method, lambda c: c["history_use"][modality])


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One claim with what was measured."""

    claim: str
    measured: str
    met: bool
    seeds: tuple[int, ...]  # of all that is compared: one seed is not a mean of three


def bars(table: Table, most: int) -> list[Bar]:
    """The study's claims, as far as the rows that they need are there. ``most``: steps of the quality mode.

    What is compared is compared on the seeds that all of it has.
    """
    checks = (_hardness, _as_good, _gap, _late, _drift, _continuity, _four_as_eight, _cheaper)
    if most <= 4:  # nothing finer was asked for that four steps could be compared with
        checks = (_drift, _continuity, _cheaper)
    out: list[Bar] = []
    for check in checks:
        try:
            out += check(table, most)
        except KeyError:  # a row that this comparison needs was not asked for
            continue
    return out


def _common(table: Table, *methods: str) -> tuple[Table, tuple[int, ...]]:
    """The table of the seeds that all of ``methods`` have rows of. KeyError where there are none."""
    return _of_seeds(table, *(table.seeds(method) for method in methods))


def _of_seeds(table: Table, *some: set[int]) -> tuple[Table, tuple[int, ...]]:
    seeds = set.intersection(*some)
    if not seeds:
        raise KeyError("no seed in common")
    return table.only(seeds), tuple(sorted(seeds))


def _hardness(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "joint")
    few, many = (1 - table.get("valid", "joint", "multi", n, EARLY).mean for n in (4, most))
    ratio = few / max(many, 1e-9)
    claim = (
        f"the world is hard enough: invalid chunks of the joint network, 4 Euler steps over {most}, at least {HARD:g}"
    )
    return [Bar(claim=claim, measured=f"{few:.3f} / {many:.3f} = {ratio:.1f}", met=ratio >= HARD, seeds=seeds)]


def _best(table: Table, most: int) -> bool:
    """Whether teacher forcing at its best was asked with guidance."""
    return table.has("teacher_forcing", "multi", most, True, EARLY)


def _as_good(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "mutual", "teacher_forcing")
    out, guided = list[Bar](), _best(table, most)
    for metric, sign in (("sync", -1), ("syllable_error", 1), ("frechet", 1)):
        ours = table.get(metric, "mutual", "few", 4, EARLY)
        theirs = table.get(metric, "teacher_forcing", "multi", most, EARLY, guided=guided)
        met = sign * (ours.mean - theirs.mean) <= max(ours.spread, theirs.spread)
        claim = f"{metric}, {EARLY} s: Mutual Forcing at 4 NFE not worse than teacher forcing at {most * (1 + guided)}"
        out.append(Bar(claim=claim, measured=f"{ours} against {theirs}", met=met, seeds=seeds))
    return out


def _gap(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "mutual", "teacher_forcing")
    ours = table.get("valid", "mutual", "few", 4, EARLY).mean
    low, high = (table.get("valid", "teacher_forcing", "multi", n, EARLY).mean for n in (4, most))
    closed = (ours - low) / max(high - low, 1e-9)
    claim = f"valid chunks: share of the gap between 4 Euler steps and {most} that 4 few steps close, at least {GAP:g}"
    measured = f"{low:.3f} -> {ours:.3f} of {high:.3f}: {closed:.2f}"
    return [Bar(claim=claim, measured=measured, met=closed >= GAP, seeds=seeds)]


def _late(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "mutual", "teacher_forcing")
    out, guided = list[Bar](), _best(table, most)
    for metric in DRIFTING:
        ours = table.get(metric, "mutual", "few", 4, LATE)
        theirs = table.get(metric, "teacher_forcing", "multi", most, LATE, guided=guided)
        claim = f"{metric}, {LATE} s: Mutual Forcing at 4 NFE better than teacher forcing at {most * (1 + guided)}"
        out.append(Bar(claim=claim, measured=f"{ours} against {theirs}", met=ours.mean < theirs.mean, seeds=seeds))
    return out


def _growth(table: Table, metric: str, method: str) -> float:
    """Beyond what real clips of the same scripts have: windows differ in length, and with that what is measured of
    perfect clips (the bias of a Frechet distance, the noise of a mean, which adds to an error in squares)."""
    power = 1 if metric == "frechet" else 2

    def beyond(window: str) -> float:
        ours, real = table.get(metric, method, "few", 4, window), table.get(metric, "real", "multi", 0, window)
        return max(0.0, ours.mean**power - real.mean**power) ** (1 / power)

    return beyond(LATE) - beyond(EARLY)


def _drift(table: Table, most: int) -> list[Bar]:
    out: list[Bar] = []
    for metric in DRIFTING:
        for other in ("shortcut_forced", "dmd_forced", "hybrid_forced"):
            if table.has(other, "few", 4, False, LATE):
                same, seeds = _common(table, "mutual", other, "real")
                ours, theirs = (_growth(same, metric, method) for method in ("mutual", other))
                claim = f"{metric}: growth from {EARLY} s to {LATE} s none, or at most half of {METHODS[other].title}"
                met = ours <= max(0.0, DRIFT * theirs)
                out.append(Bar(claim=claim, measured=f"{ours:.3f} against {theirs:.3f}", met=met, seeds=seeds))
    return out


def _continuity(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "mutual")
    seam = table.get("seam", "mutual", "few", 4, LATE)
    claim = f"seam energy, {LATE} s, over the data's, at most {SEAM:g}"
    out = [Bar(claim=claim, measured=str(seam), met=seam.mean <= SEAM, seeds=seeds)]
    for modality in ("video", "audio"):
        ours, joint = (table.history_use(m, modality).mean for m in ("mutual", "joint"))
        claim = f"history use of {modality} over the joint network's, at least {USE:g}"
        measured = f"{ours:.2f} / {joint:.2f} = {ours / joint:.2f}"
        out.append(Bar(claim=claim, measured=measured, met=ours / joint >= USE, seeds=seeds))
    return out


def _four_as_eight(table: Table, most: int) -> list[Bar]:
    table, seeds = _common(table, "mutual")
    out: list[Bar] = []
    for metric, sign in (("frechet", 1), ("valid", -1), ("sync", -1), ("syllable_error", 1)):
        four, eight = (table.get(metric, "mutual", "few", n, EARLY) for n in (4, 8))
        met = sign * (four.mean - eight.mean) <= max(four.spread, eight.spread)
        claim = f"{metric}, {EARLY} s: 4 few steps not worse than 8 beyond the spread"
        out.append(Bar(claim=claim, measured=f"{four} against {eight}", met=met, seeds=seeds))
    return out


def _cheaper(table: Table, most: int) -> list[Bar]:
    table, seeds = _of_seeds(table, *(table.trained(method) for method in ("mutual", "dmd_self_forcing")))
    out: list[Bar] = []
    for what, of in (
        ("bytes of model state", lambda c: c["state_bytes"]),
        ("CPU seconds per step", lambda c: c["cpu_seconds"] / c["steps"]),
    ):
        ours, theirs = (table.cost(m, of).mean for m in ("mutual", "dmd_self_forcing"))
        claim = f"{what} below DMD with self-forcing (one fake-score update per step on both sides)"
        out.append(Bar(claim=claim, measured=f"{ours:.4g} against {theirs:.4g}", met=ours < theirs, seeds=seeds))
    return out


def markdown(table: Table, most: int) -> str:
    """The results as a page: bars, what one change does, then a table per window, then what each training took."""
    lines = ["## Bars", "", "| claim | measured | seeds | |", "|-|-|-|-|"]
    lines += [
        f"| {b.claim} | {b.measured} | {_seeds(b.seeds)} | {'met' if b.met else 'MISSED'} |" for b in bars(table, most)
    ]
    lines += _ablations(table)
    windows = list(dict.fromkeys(key[4] for key in table.order))
    for window in windows:
        lines += ["", f"## {window} s", "", f"| method | mode | steps | NFE | {' | '.join(SHOWN)} |"]
        lines.append("|" + "-|" * (4 + len(SHOWN)))
        for key in table.order:
            if key[4] == window:
                lines.append(_line(table, key))
    lines += [
        "",
        "## Training",
        "",
        "| method | history use, video / audio | state, MB | CPU s per step |",
        "|-|-|-|-|",
    ]
    for method in ("joint", *METHODS):
        if method in table.costs:
            step = table.cost(method, lambda c: c["cpu_seconds"] / c["steps"])
            lines.append(f"| {title(method)} | {_use(table, method)} | {_state(table, method)} | {step} |")
    return "\n".join(lines) + "\n"


def _ablations(table: Table) -> list[str]:
    """A row per ablation; before them the unchanged method, of their seeds alone: one seed is not a mean of three."""
    names = [name for name in ABLATIONS if table.seeds(name) and name in table.costs]
    if not names:
        return []
    same, (few, more) = table.only(table.seeds(*names)), ABLATION_COUNTS
    columns: dict[str, tuple[str, int, tuple[str, ...]]] = {
        f"frechet, {few} steps": ("frechet", few, (EARLY, LATE)),
        "identity_error": ("identity_error", few, (EARLY, LATE)),
        "voice_error": ("voice_error", few, (EARLY, LATE)),
        f"valid, {EARLY} s": ("valid", few, (EARLY,)),
        f"syllable_error, {EARLY} s": ("syllable_error", few, (EARLY,)),
        f"sync, {EARLY} s": ("sync", few, (EARLY,)),
        f"seam, {LATE} s": ("seam", few, (LATE,)),
        f"frechet, {more} steps": ("frechet", more, (EARLY, LATE)),
        f"valid, {EARLY} s, {more} steps": ("valid", more, (EARLY,)),
    }

    def cell(method: str, metric: str, steps: int, windows: tuple[str, ...]) -> str:
        asked = [w for w in windows if same.has(method, "few", steps, False, w)]
        return " -> ".join(f"{same.get(metric, method, 'few', steps, w).mean:.3f}" for w in asked) or "-"

    seeds = _seeds(table.seeds(*names))
    lines = ["", "## One change at a time", "", f"Seeds: {seeds}. Arrows lead from {EARLY} s to {LATE} s.", ""]
    lines.append(f"| | {' | '.join(columns)} | history use, video / audio | state, MB |")
    lines.append("|" + "-|" * (len(columns) + 3))
    for name in [n for n in ("mutual", *names) if n in same.costs]:
        cells = [cell(name, *of) for of in columns.values()]
        lines.append(f"| {title(name)} | {' | '.join(cells)} | {_use(same, name)} | {_state(same, name)} |")
    return lines


def _seeds(seeds: Collection[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _use(table: Table, method: str) -> str:
    return " / ".join(f"{table.history_use(method, m).mean:.2f}" for m in ("video", "audio"))


def _state(table: Table, method: str) -> str:
    return f"{table.cost(method, lambda c: c['state_bytes'] / 1e6).mean:.1f}"


def title(method: str) -> str:
    """A method's name in tables, with its letter."""
    return f"{METHODS[method].key}) {METHODS[method].title}" if method in METHODS else method


def _line(table: Table, key: tuple[Any, ...]) -> str:
    method, mode, steps, guided, window = key
    cells = [str(table.get(name, method, mode, steps, window, guided=guided)) for name in SHOWN]
    shown_mode = {"multi": "Euler" + (", guided" if guided else ""), "few": "few-step"}[mode] if steps else "-"
    return f"| {title(method)} | {shown_mode} | {steps or '-'} | {steps * (1 + guided) or '-'} | {' | '.join(cells)} |"
