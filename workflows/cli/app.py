"""The command line. Each verb reads its arguments and calls one function, imported inside the verb.

`mfctl --help` therefore loads neither torch nor Ray, and a verb works where another one's libraries are missing.

Exit codes: 0 done, 1 failed, 2 wrong usage or wrong input. See ``console.py`` for what is printed where.
"""

import typer

from workflows.cli import bench, evaluate, jobs, study
from workflows.cli.data import inspect, manifest, preprocess, reconstruct, toyworld
from workflows.cli.generate import generate
from workflows.cli.system import demo, doctor, mlflow
from workflows.cli.train import train
from workflows.utils import environment

app = typer.Typer(
    name="mfctl",
    help="Mutual Forcing: media files in, a streaming audio-video model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


for _command in (
    doctor,
    demo,
    toyworld,
    preprocess,
    inspect,
    manifest,
    reconstruct,
    train,
    generate,
    mlflow,
    evaluate.evaluate,
    study.study,
):
    app.command()(_command)
app.add_typer(bench.app)
app.add_typer(jobs.app)


def main() -> None:
    """Entry point of `mfctl` and of `python -m workflows.cli`."""
    environment.apply_defaults()
    environment.chdir_to_base()
    app(prog_name="mfctl")
