"""Error class that separates wrong input from internal errors, for all packages."""

from fractions import Fraction


class UserInputError(ValueError):
    """Wrong input of the user; the message contains the value and the fix.

    The command line prints the message of this class alone and exits with code 2. Any other ValueError is an internal
    error.
    """


def check_range(name: str, value: float | Fraction | None, least: float, most: float, *, above: bool = False) -> None:
    """Raise UserInputError unless ``value`` is None or from ``least`` to ``most``; NaN is outside.

    Args:
        name: setting or option, for the message.
        value: number to check.
        least: smallest allowed value.
        most: largest allowed value.
        above: ``least`` itself is not allowed.
    """
    if value is None or (least <= value <= most and not (above and value == least)):
        return
    bounds = f"a number above {_plain(least)}, at most" if above else f"{_plain(least)} to"
    given = f"{name} {value}" if name.startswith("--") else f"{name}={value}"
    raise UserInputError(f"{given}: use {bounds} {_plain(most)}")


def _plain(bound: float) -> str:
    """Return an integer with all digits, another number in short form."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
