"""`mfctl train`: train one stage."""

from typing import Annotated, Any, Literal

import typer

from workflows.cli import output
from workflows.cli.options import ConfigFile, ConfigOverrides, DryRunFlag, JsonFlag, PresetName
from workflows.cli.traits import command
from workflows.utils import environment

INPUTS = "Inputs"


Stage = Annotated[Literal["video", "audio", "joint", "mutual"], typer.Option(help="Training stage.")]
Data = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_dataset,
        metavar="DATASET",
        rich_help_panel=INPUTS,
        show_default="newest finished dataset under runs/",
        help="Dataset: folder or s3:// prefix.",
    ),
]
InitFrom = Annotated[
    list[str],
    typer.Option(
        "--from",
        parser=environment.resolve_existing_path,
        metavar="RUN",
        default_factory=list,
        show_default=False,
        rich_help_panel=INPUTS,
        help="Finished parent run, repeatable (default: the latest ones under runs/). A run of the same stage: "
        "continue from its weights.",
    ),
]
InitVideoFrom = Annotated[
    str | None,
    typer.Option(
        parser=environment.resolve_path,
        metavar="DIR",
        rich_help_panel=INPUTS,
        help="Folder of Wan video weights to start from (stage video, preset base).",
    ),
]
Run = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default="stage and digest of the configuration",
        help="Name of the run; the name of an existing run resumes it.",
    ),
]


@command(writes_runs=True, paths=("data", "init_from", "init_video_from", "config"))
def train(
    *,
    stage: Stage,
    data: Data = None,
    init_from: InitFrom,
    init_video_from: InitVideoFrom = None,
    run: Run = None,
    preset: PresetName = "tiny",
    sets: ConfigOverrides,
    config: ConfigFile = None,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Train one stage on Ray Train and DeepSpeed. Rerun the same command to resume.

    Example: mfctl train --stage joint --data runs/toy --from runs/video --from runs/audio
    """

    def work() -> Any:
        from json import dumps

        from workflows.training.samples import final_samples
        from workflows.training.train import train_stage

        video_sets = [f"init_video={dumps(init_video_from)}"] if init_video_from else []
        return train_stage(
            stage,
            data=data,
            init_from=init_from,
            preset=preset,
            sets=[*sets, *video_sets],
            config_file=config,
            run=run,
            dry_run=dry_run,
            sample=final_samples,
        )

    output.run_command(work, as_json=json)
