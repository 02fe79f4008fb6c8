"""Traits of a command that `mfctl submit` needs, declared at the command itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_ATTRIBUTE = "command_traits"


@dataclass(frozen=True, kw_only=True)
class CommandTraits:
    """Facts about a command that its options do not show."""

    writes_runs: bool = False  # writes run directories and tracking entries
    driver_only: bool = False  # computes in the process of the command, not in Ray workers
    paths: tuple[str, ...] = ()  # parameters with paths, URIs or names of runs as values


def command(
    *, writes_runs: bool = False, driver_only: bool = False, paths: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Declare the traits of a command function; typer copies function attributes to its callback."""
    traits = CommandTraits(writes_runs=writes_runs, driver_only=driver_only, paths=paths)

    def declare(function: Function) -> Function:
        vars(function)[_ATTRIBUTE] = traits
        return function

    return declare


def traits_of(callback: Callable[..., Any] | None) -> CommandTraits:
    """Return the traits declared at a command function, or the defaults."""
    return vars(callback).get(_ATTRIBUTE, CommandTraits()) if callback else CommandTraits()
