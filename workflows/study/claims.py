"""Thresholds of the study's claims, checked on its results."""

from dataclasses import dataclass

from workflows.study.methods import METHODS
from workflows.study.results_table import DRIFT_COLUMNS, EARLY, LATE, ResultTable

HARD = 5.0  # minimum ratio of invalid chunks, 4 Euler steps over the maximum
GAP = 0.8  # minimum share of the gap in valid chunks
SEAM = 1.5  # maximum seam energy over the data's
USE = 0.8  # minimum history use over the joint network's
DRIFT = 0.5  # maximum growth over that of a baseline


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim and its measurement."""

    claim: str
    measured: str
    met: bool
    seeds: tuple[int, ...]  # common to all compared methods


def check_claims(table: ResultTable, max_steps: int) -> list[Claim]:
    """Return the claims that the rows can decide, each on the common seeds of its methods.

    ``max_steps``: step count of the quality mode.
    """
    checks = (_hardness, _as_good, _gap, _late, _drift, _continuity, _four_as_eight, _cheaper)
    if max_steps <= 4:  # no larger step count to compare four steps with
        checks = (_drift, _continuity, _cheaper)
    out: list[Claim] = []
    for check in checks:
        try:
            out += check(table, max_steps)
        except KeyError:  # a row is missing
            continue
    return out


def _with_common_seeds(table: ResultTable, *methods: str) -> tuple[ResultTable, tuple[int, ...]]:
    """Return the table and the common seeds of ``methods``. Raises KeyError if there are none."""
    return _restrict_seeds(table, *(table.seeds(method) for method in methods))


def _restrict_seeds(table: ResultTable, *seed_sets: set[int]) -> tuple[ResultTable, tuple[int, ...]]:
    seeds = set.intersection(*seed_sets)
    if not seeds:
        raise KeyError("no seed in common")
    return table.with_seeds(seeds), tuple(sorted(seeds))


def _hardness(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "joint")
    few = 1 - table.get("valid", "joint", "multi", steps=4, window=EARLY).mean
    many = 1 - table.get("valid", "joint", "multi", steps=max_steps, window=EARLY).mean
    ratio = few / max(many, 1e-9)
    claim = (
        "the world is hard enough: invalid chunks of the joint network, "
        f"4 Euler steps over {max_steps}, at least {HARD:g}"
    )
    return [Claim(claim=claim, measured=f"{few:.3f} / {many:.3f} = {ratio:.1f}", met=ratio >= HARD, seeds=seeds)]


def _has_guided_baseline(table: ResultTable, max_steps: int) -> bool:
    """Return True if there are rows of guided teacher forcing."""
    return table.has("teacher_forcing", "multi", steps=max_steps, window=EARLY, guided=True)


def _as_good(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "mutual", "teacher_forcing")
    out, guided = list[Claim](), _has_guided_baseline(table, max_steps)
    for metric, sign in (("sync", -1), ("syllable_error", 1), ("frechet", 1)):
        ours = table.get(metric, "mutual", "few", steps=4, window=EARLY)
        theirs = table.get(metric, "teacher_forcing", "multi", steps=max_steps, window=EARLY, guided=guided)
        met = sign * (ours.mean - theirs.mean) <= max(ours.spread, theirs.spread)
        claim = (
            f"{metric}, {EARLY} s: Mutual Forcing at 4 NFE not worse than teacher forcing at {max_steps * (1 + guided)}"
        )
        out.append(Claim(claim=claim, measured=f"{ours} against {theirs}", met=met, seeds=seeds))
    return out


def _gap(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "mutual", "teacher_forcing")
    ours = table.get("valid", "mutual", "few", steps=4, window=EARLY).mean
    low, high = (table.get("valid", "teacher_forcing", "multi", steps=n, window=EARLY).mean for n in (4, max_steps))
    closed = (ours - low) / max(high - low, 1e-9)
    claim = (
        f"valid chunks: share of the gap between 4 Euler steps and {max_steps} that 4 few steps close, at least {GAP:g}"
    )
    measured = f"{low:.3f} -> {ours:.3f} of {high:.3f}: {closed:.2f}"
    return [Claim(claim=claim, measured=measured, met=closed >= GAP, seeds=seeds)]


def _late(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "mutual", "teacher_forcing")
    out, guided = list[Claim](), _has_guided_baseline(table, max_steps)
    for metric in DRIFT_COLUMNS:
        ours = table.get(metric, "mutual", "few", steps=4, window=LATE)
        theirs = table.get(metric, "teacher_forcing", "multi", steps=max_steps, window=LATE, guided=guided)
        claim = f"{metric}, {LATE} s: Mutual Forcing at 4 NFE better than teacher forcing at {max_steps * (1 + guided)}"
        out.append(Claim(claim=claim, measured=f"{ours} against {theirs}", met=ours.mean < theirs.mean, seeds=seeds))
    return out


def _growth(table: ResultTable, metric: str, method: str) -> float:
    """Return the growth of a metric from EARLY to LATE beyond its value on real clips.

    Windows differ in length, and so do the metrics of real clips. Errors add in squares, the Frechet distance linearly.
    """
    power = 1 if metric == "frechet" else 2

    def beyond(window: str) -> float:
        ours = table.get(metric, method, "few", steps=4, window=window)
        real = table.get(metric, "real", "multi", steps=0, window=window)
        return max(0.0, ours.mean**power - real.mean**power) ** (1 / power)

    return beyond(LATE) - beyond(EARLY)


def _drift(table: ResultTable, max_steps: int) -> list[Claim]:
    out: list[Claim] = []
    for metric in DRIFT_COLUMNS:
        for other in ("shortcut_forced", "dmd_forced", "hybrid_forced"):
            if table.has(other, "few", steps=4, window=LATE):
                same, seeds = _with_common_seeds(table, "mutual", other, "real")
                ours, theirs = (_growth(same, metric, method) for method in ("mutual", other))
                claim = f"{metric}: growth from {EARLY} s to {LATE} s none, or at most half of {METHODS[other].title}"
                met = ours <= max(0.0, DRIFT * theirs)
                out.append(Claim(claim=claim, measured=f"{ours:.3f} against {theirs:.3f}", met=met, seeds=seeds))
    return out


def _continuity(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "mutual")
    seam = table.get("seam", "mutual", "few", steps=4, window=LATE)
    claim = f"seam energy, {LATE} s, over the data's, at most {SEAM:g}"
    out = [Claim(claim=claim, measured=str(seam), met=seam.mean <= SEAM, seeds=seeds)]
    for modality in ("video", "audio"):
        ours, joint = (table.history_use(m, modality).mean for m in ("mutual", "joint"))
        claim = f"history use of {modality} over the joint network's, at least {USE:g}"
        measured = f"{ours:.2f} / {joint:.2f} = {ours / joint:.2f}"
        out.append(Claim(claim=claim, measured=measured, met=ours / joint >= USE, seeds=seeds))
    return out


def _four_as_eight(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _with_common_seeds(table, "mutual")
    out: list[Claim] = []
    for metric, sign in (("frechet", 1), ("valid", -1), ("sync", -1), ("syllable_error", 1)):
        four, eight = (table.get(metric, "mutual", "few", steps=n, window=EARLY) for n in (4, 8))
        met = sign * (four.mean - eight.mean) <= max(four.spread, eight.spread)
        claim = f"{metric}, {EARLY} s: 4 few steps not worse than 8 beyond the spread"
        out.append(Claim(claim=claim, measured=f"{four} against {eight}", met=met, seeds=seeds))
    return out


def _cheaper(table: ResultTable, max_steps: int) -> list[Claim]:
    table, seeds = _restrict_seeds(table, *(table.trained(method) for method in ("mutual", "dmd_self_forcing")))
    out: list[Claim] = []
    for what, of in (
        ("bytes of model state", lambda c: c["state_bytes"]),
        ("CPU seconds per step", lambda c: c["cpu_seconds"] / c["steps"]),
    ):
        ours, theirs = (table.cost(m, of).mean for m in ("mutual", "dmd_self_forcing"))
        claim = f"{what} below DMD with self-forcing (one fake-score update per step on both sides)"
        out.append(Claim(claim=claim, measured=f"{ours:.4g} against {theirs:.4g}", met=ours < theirs, seeds=seeds))
    return out
