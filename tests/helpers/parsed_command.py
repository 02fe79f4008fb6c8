"""Parse a command as `mfctl submit` does."""

from collections.abc import Sequence

from typer.main import get_command

from workflows.cli.app import app
from workflows.cli.parse import parse_command
from workflows.jobs.command import ParsedCommand


def parse(argv: Sequence[str], base: str | None = None) -> ParsedCommand:
    """Return the parsed command; relative paths start from ``base``."""
    return parse_command(get_command(app), argv, base)
