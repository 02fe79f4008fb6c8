"""Text tables of the results of ``mfctl bench gpu``. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from workflows.bench.gpu.targets import TARGETS, TargetResult


def format_summary(
    records: Sequence[Mapping[str, Any]], targets: Mapping[str, TargetResult], problems: Sequence[str]
) -> str:
    """Return the finished cases with their numbers, the targets, and one line per problem."""
    lines: list[str] = []
    for part in dict.fromkeys(str(r["part"]) for r in records):
        done = [r for r in records if r["part"] == part and r.get("status") == "done"]
        lines += ["", part] if done else []
        for record in done:
            lines += _case(str(record["case"]), record.get("result", {}))
    lines += ["", "targets"]
    for name, found in targets.items():
        measured = "not measured" if found["measured"] is None else _number(found["measured"])
        outcome = {True: "met", False: "missed", None: ""}[found["met"]]
        lines.append(f"  {name:36} {measured:>14}   {TARGETS[name].kind} {found['target']:g}   {outcome}".rstrip())
    lines += ["", *([*problems] or ["every case is done"])]
    return "\n".join(lines).lstrip("\n")


def _case(name: str, result: Mapping[str, Any]) -> list[str]:
    """Return one line with the numbers of a case, and its tables below."""
    numbers = [f"{k} {_number(v)}" for k, v in result.items() if isinstance(v, int | float | str)]
    lines = [f"  {name}: {', '.join(numbers)}"]
    for key, rows in result.items():
        if isinstance(rows, Mapping):
            lines.append(f"    {key}: " + ", ".join(f"{k} {_number(v)}" for k, v in rows.items()))
        elif isinstance(rows, list) and rows and isinstance(rows[0], Mapping):
            lines.append(f"    {key}:")
            lines += ["      " + "  ".join(f"{_number(v)}" for v in row.values()) for row in rows]
    return lines


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
