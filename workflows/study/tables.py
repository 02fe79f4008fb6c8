"""Results of a study as a Markdown page."""

from collections.abc import Collection

from workflows.study.claims import check_claims
from workflows.study.methods import ABLATION_COUNTS, ABLATIONS, METHODS
from workflows.study.results_table import COLUMNS, EARLY, LATE, ResultKey, ResultTable, method_title


def to_markdown(table: ResultTable, most: int) -> str:
    """Return the page: claims, ablations, a table per window, and training costs."""
    lines = ["## Bars", "", "| claim | measured | seeds | |", "|-|-|-|-|"]
    lines += [
        f"| {b.claim} | {b.measured} | {_seeds(b.seeds)} | {'met' if b.met else 'MISSED'} |"
        for b in check_claims(table, most)
    ]
    lines += _ablations(table)
    windows = list(dict.fromkeys(key.window for key in table.keys))
    for window in windows:
        lines += ["", f"## {window} s", "", f"| method | mode | steps | NFE | {' | '.join(COLUMNS)} |"]
        lines.append("|" + "-|" * (4 + len(COLUMNS)))
        lines += [_line(table, key) for key in table.keys if key.window == window]
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
            lines.append(f"| {method_title(method)} | {_use(table, method)} | {_state(table, method)} | {step} |")
    return "\n".join(lines) + "\n"


def _ablations(table: ResultTable) -> list[str]:
    """Return a row per ablation after a row of the unchanged method on the same seeds."""
    names = [name for name in ABLATIONS if table.seeds(name) and name in table.costs]
    if not names:
        return []
    same, (few, more) = table.with_seeds(table.seeds(*names)), ABLATION_COUNTS
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
        found = [w for w in windows if same.has(method, "few", steps=steps, window=w)]
        means = [same.get(metric, method, "few", steps=steps, window=w).mean for w in found]
        return " -> ".join(f"{mean:.3f}" for mean in means) or "-"

    seeds = _seeds(table.seeds(*names))
    lines = ["", "## One change at a time", "", f"Seeds: {seeds}. Arrows lead from {EARLY} s to {LATE} s.", ""]
    lines.append(f"| | {' | '.join(columns)} | history use, video / audio | state, MB |")
    lines.append("|" + "-|" * (len(columns) + 3))
    for name in [n for n in ("mutual", *names) if n in same.costs]:
        cells = [cell(name, *of) for of in columns.values()]
        lines.append(f"| {method_title(name)} | {' | '.join(cells)} | {_use(same, name)} | {_state(same, name)} |")
    return lines


def _seeds(seeds: Collection[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _use(table: ResultTable, method: str) -> str:
    return " / ".join(f"{table.history_use(method, m).mean:.2f}" for m in ("video", "audio"))


def _state(table: ResultTable, method: str) -> str:
    return f"{table.cost(method, lambda c: c['state_bytes'] / 1e6).mean:.1f}"


def _line(table: ResultTable, key: ResultKey) -> str:
    series = key.series
    steps = key.steps
    row = table.row(key)
    cells = [str(row[name]) for name in COLUMNS]
    mode = series.mode_title if steps else "-"
    evaluations = steps * (1 + series.guided)
    title = method_title(series.method)
    return f"| {title} | {mode} | {steps or '-'} | {evaluations or '-'} | {' | '.join(cells)} |"
