from typing import Annotated, Any

import typer

from workflows.cli import output
from workflows.cli.options import ConfigFile, ConfigOverrides, DryRunFlag, JsonFlag, PresetName
from workflows.cli.traits import command
from workflows.config.stage_names import Stage
from workflows.utils import environment


@command(writes_runs=True, paths=("data", "init_from", "init_video_from", "config"))
def train(
    *,
    stage: Annotated[Stage, typer.Option(help="What to train.")],
    data: Annotated[
        str | None,
        typer.Option(
            parser=environment.resolve_path, metavar="DATASET", help="Default: the newest dataset under runs/."
        ),
    ] = None,
    init_from: Annotated[
        list[str],
        typer.Option(
            "--from",
            parser=environment.resolve_existing_path,
            metavar="RUN",
            default_factory=list,
            show_default=False,
            help="Finished runs to start from; default: the latest ones under runs/. May be repeated.",
        ),
    ],
    init_video_from: Annotated[
        str | None,
        typer.Option(
            parser=environment.resolve_path, metavar="DIR", help="Start from Wan's video weights in this folder (base)."
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run; the same name resumes.")] = None,
    preset: PresetName = "tiny",
    sets: ConfigOverrides,
    config: ConfigFile = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train one stage on Ray Train and DeepSpeed. The same command again resumes."""

    def work() -> Any:
        from json import dumps as quoted

        from workflows.training.samples import final_samples
        from workflows.training.train import train_stage as run_train

        return run_train(
            stage,
            data=data,
            init_from=init_from,
            preset=preset,
            sets=[*sets, *([f"init_video={quoted(init_video_from)}"] if init_video_from else [])],
            config_file=config,
            run=run,
            dry_run=dry_run,
            sample=final_samples,
        )

    output.run_command(work, as_json=json)
