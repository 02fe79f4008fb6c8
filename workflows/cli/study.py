"""``mfctl study``: the method against its baselines at equal budget. Part of the command line in ``cli.py``."""

from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import ConfigOverrides, DryRunFlag, JsonFlag
from workflows.cli.traits import command
from workflows.utils import environment

DEFAULT_STUDY_DIR = "runs/study"


@command(writes_runs=True, driver_only=True, paths=("out", "networks"))
def study(
    *,
    out: Annotated[str, typer.Option(parser=environment.resolve_path, help="Folder of the study.")] = DEFAULT_STUDY_DIR,
    preset: Annotated[
        Literal["toy-study", "quick"] | None,
        typer.Option(help="Sizes of network, budget and sweep.", show_default="toy-study"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Preset quick; 3 methods, 1 seed where nothing else is said. Minutes.")
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|A,B",
            help="How many seeds, or which: of the core methods and of those that are named; others have the first.",
            show_default="3",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Which rows: all, core, ablations, or names.", show_default="all"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    networks: Annotated[
        str | None,
        typer.Option(
            parser=environment.resolve_path, metavar="DIR", help="Another study, whose trained networks are taken over."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Begin nothing after so long, and save; scores that are being made end. It then goes on."),
    ] = None,
    sets: ConfigOverrides,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train the method and its baselines from one joint network each, and compare them in one table."""

    def work() -> Any:
        from workflows.study.study import run_study as run

        return run(
            out=out,
            **_which(quick, preset, seeds, methods),
            device=device,
            workers=workers,
            minutes=minutes,
            sets=sets,
            dry_run=dry_run,
            tracking=environment.tracking_uri(),
            networks=networks,
        )

    output.run_command(
        work, as_json=json, render=_page, code=lambda result: output.FAILED if result.get("failed") else 0
    )


def _which(quick: bool, preset: str | None, seeds: str | None, methods: str | None) -> dict[str, Any]:
    """What ``--quick`` leaves open and what it says."""
    if quick and preset not in (None, "quick"):
        raise ValueError(f"--quick is the preset quick: leave out --preset {preset}, or --quick")
    usual = ("quick", "1", "quick") if quick else ("toy-study", "3", "all")
    return {
        "preset": preset or usual[0],
        "seeds": seeds or usual[1],
        "methods": (methods or usual[2]).split(","),
    }


def _page(result: Any) -> str:
    import yaml

    return result.get("page") or yaml.safe_dump(result, sort_keys=False)
