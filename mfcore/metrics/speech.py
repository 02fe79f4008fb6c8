"""Errors of recognised speech, whoever recognised it."""

from collections.abc import Hashable, Sequence

Units = Sequence[Hashable]


def edit_distance(heard: Units, said: Units) -> int:
    """Least number of insertions, deletions and substitutions (Levenshtein) that turn one into the other."""
    row = list(range(len(said) + 1))
    for i, unit in enumerate(heard, start=1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(said, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (unit != wanted))
    return row[-1]


def error_rate(heard: Sequence[Units], said: Sequence[Units]) -> float:
    """Sum of edit distances / number of units said, over clips: the word error rate of words, 0 to above 1.

    With syllables or characters as units it is their error rate. ValueError where counts differ or nothing is said.
    """
    if len(heard) != len(said):
        raise ValueError(f"{len(heard)} clips heard but {len(said)} said: give one transcript per clip")
    total = sum(len(units) for units in said)
    if total == 0:
        raise ValueError("an error rate is a share of what is said, and nothing is: leave out clips without speech")
    return sum(edit_distance(h, s) for h, s in zip(heard, said, strict=True)) / total
