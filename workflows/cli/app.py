"""The `mfctl` command line. Each command parses its arguments and calls one function, imported inside the command.

`mfctl --help` therefore loads neither torch nor Ray, and a command works without the libraries of the others.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong input. See ``output.py`` for the contract of the output streams.
"""

import sys
from typing import Annotated, Any, cast

import typer
from typer.rich_utils import rich_format_error

from workflows.cli import bench, evaluate, jobs, output, study
from workflows.cli.data import inspect, manifest, preprocess, reconstruct, toyworld
from workflows.cli.errors import describe_error
from workflows.cli.export import export, register
from workflows.cli.generate import generate
from workflows.cli.models import models
from workflows.cli.serve import serve
from workflows.cli.system import demo, doctor, mlflow
from workflows.cli.train import train
from workflows.utils import environment

try:
    from typer.exceptions import TyperException
except ModuleNotFoundError:  # typer before 0.26, on a machine with its own packages
    TyperException = cast(Any, typer).core.click.ClickException

app = typer.Typer(
    name="mfctl",
    help="Mutual Forcing: from media files to a streaming audio-video model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
COMMANDS = {
    "System": (doctor, demo, mlflow),
    "Data": (toyworld, manifest, preprocess, inspect, reconstruct),
    "Training": (train,),
    "Generation and evaluation": (generate, serve, evaluate.evaluate, models, export, register, study.study),
}
"""Commands by panel of the help text."""

for _panel, _functions in COMMANDS.items():
    for _function in _functions:
        app.command(rich_help_panel=_panel)(_function)
app.add_typer(bench.app, rich_help_panel="Benchmarks")
app.add_typer(jobs.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        output.write_stdout(f"mfctl {version('mutual-forcing')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mutual Forcing: from media files to a streaming audio-video model."""


def main() -> None:
    """Run the command line: entry point of `mfctl` and of `python -m workflows.cli`."""
    try:
        output.check_stdout()
        environment.apply_defaults()
        environment.chdir_to_base()
        try:
            code = app(prog_name="mfctl", standalone_mode=False)
        except TyperException as error:  # unknown command or option, value out of range
            rich_format_error(cast(Any, error))  # its annotation names the private subclass
            words = sys.argv[1:]
            as_json = "--json" in words[: words.index("--") if "--" in words else None]
            output.print_json_error(error.format_message(), error.exit_code, as_json=as_json)
            sys.exit(error.exit_code)
        finally:
            output.write_stdout("")  # flush help texts here, where a failure is reported
        sys.exit(code or 0)
    except BrokenPipeError:
        output.discard_stdout()
        sys.exit(1)
    except Exception as error:  # outside of commands, which report their own errors
        message, code = describe_error(error)
        output.print_error(message)
        sys.exit(code)
