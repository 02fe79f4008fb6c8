"""`mfctl study`: compare the method with its baselines at equal budget."""

from typing import Annotated, Any, Literal

import typer

from mfcore.errors import UserInputError
from workflows.cli import output
from workflows.cli.errors import FAILED
from workflows.cli.options import ConfigOverrides, DryRunFlag, JsonFlag
from workflows.cli.traits import command
from workflows.utils import environment

DEFAULT_STUDY_DIR = "runs/study"
SCOPE = "Scope"
EXECUTION = "Execution"


Out = Annotated[str, typer.Option(parser=environment.resolve_path, metavar="DIR", help="Folder of the study.")]
Preset = Annotated[
    Literal["toy-study", "quick"] | None,
    typer.Option(show_default="toy-study", help="Sizes of network, budget and sweep."),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Preset quick with 3 methods and 1 seed, unless given; runs for minutes.")
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="N|A,B",
        rich_help_panel=SCOPE,
        help="Number of seeds, or a list, for core and named methods; other methods use the first.",
        show_default="3",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        rich_help_panel=SCOPE,
        show_default="all",
        help="Methods: all, core, ablations, quick, or names of rows.",
    ),
]
Device = Annotated[str, typer.Option(rich_help_panel=EXECUTION, help="Device: cpu, cuda, cuda:1.")]
Workers = Annotated[int, typer.Option(min=1, rich_help_panel=EXECUTION, help="Concurrent processes.")]
Networks = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_path,
        metavar="DIR",
        rich_help_panel=EXECUTION,
        help="Other study with trained networks to reuse.",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=EXECUTION,
        help="Time budget in minutes: no task starts after it. Rerun the same command to continue.",
    ),
]


@command(writes_runs=True, driver_only=True, paths=("out", "networks"))
def study(
    *,
    out: Out = DEFAULT_STUDY_DIR,
    preset: Preset = None,
    quick: Quick = False,
    seeds: Seeds = None,
    methods: Methods = None,
    device: Device = "cpu",
    workers: Workers = 2,
    networks: Networks = None,
    minutes: Minutes = None,
    sets: ConfigOverrides,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train the method and its baselines from one joint network each, and compare them in one table.

    Example: mfctl study --quick --out runs/study
    """

    def work() -> Any:
        from workflows.study.study import run_study

        return run_study(
            out=out,
            **_scope(quick, preset, seeds, methods),
            device=device,
            workers=workers,
            minutes=minutes,
            sets=sets,
            dry_run=dry_run,
            tracking=environment.tracking_uri(),
            networks=networks,
        )

    output.run_command(work, as_json=json, render=_report, code=lambda result: FAILED if result.get("failed") else 0)


def _scope(quick: bool, preset: str | None, seeds: str | None, methods: str | None) -> dict[str, Any]:
    """Return preset, seeds and methods: the given values, or the defaults with or without ``--quick``."""
    if quick and preset not in (None, "quick"):
        raise UserInputError(
            f"--quick contradicts --preset {preset}: --quick is the preset quick. Remove one of the two options"
        )
    defaults = ("quick", "1", "quick") if quick else ("toy-study", "3", "all")
    return {
        "preset": preset or defaults[0],
        "seeds": seeds or defaults[1],
        "methods": (methods or defaults[2]).split(","),
    }


def _report(result: Any) -> str:
    import yaml

    return result.get("page") or yaml.safe_dump(result, sort_keys=False)
