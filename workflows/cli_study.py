"""``mfctl study``: the method against its baselines at equal budget. Part of the command line in ``cli.py``."""

from typing import Annotated, Any, Literal

import typer

from workflows import console, environment
from workflows.options import DryRun, Json, Sets

OUT = "runs/study"


def study(
    *,
    out: Annotated[str, typer.Option(parser=environment.absolute, help="Folder of the study.")] = OUT,
    preset: Annotated[
        Literal["toy-study", "quick"], typer.Option(help="Sizes of network, budget and sweep.")
    ] = "toy-study",
    quick: Annotated[bool, typer.Option("--quick", help="Preset quick: 3 methods, 1 seed, under ten minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the core methods; the others have one.")] = 3,
    methods: Annotated[str, typer.Option(metavar="A,B", help="Which rows: all, core, ablations, or names.")] = "all",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    networks: Annotated[
        str | None,
        typer.Option(
            parser=environment.absolute, metavar="DIR", help="Another study, whose trained networks are taken over."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    sets: Sets,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train the method and its baselines from one joint network each, and compare them in one table."""

    def work() -> Any:
        from workflows.study.report import study as run

        return run(
            out=out,
            preset="quick" if quick else preset,
            seeds=1 if quick else seeds,
            methods=["quick"] if quick else methods.split(","),
            device=device,
            workers=workers,
            minutes=minutes,
            sets=sets,
            dry_run=dry_run,
            tracking=environment.tracking_uri(),
            networks=networks,
        )

    def render(result: Any) -> str:
        import yaml

        return result.get("page") or yaml.safe_dump(result, sort_keys=False)

    console.run(work, as_json=json, render=render)
