"""Verbs about the toy world: build, tasks, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shared.cli import friendly_errors

app = typer.Typer(no_args_is_help=True, help="The toy world: build its data and models, look at a scene.")


@app.command("build")
@friendly_errors
def build(
    models: Annotated[str, typer.Option(help="Comma-separated models to train: A,B,C,D,E. Empty: none.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder to write the toy data set to.")] = None,
    to: Annotated[Path, typer.Option(help="Folder that gets one folder per model.")] = Path("trainer/toy/models"),
    steps: Annotated[int | None, typer.Option(help="Train each model for this many steps instead of its own.")] = None,
) -> None:
    """Write the toy data set (CLEVR v1.0 format), or train the tiny models that ship with the project.

    Models are trained on their own images, apart from every split of the data set, and evaluated on 500 unseen
    scenes; the figures go into each model's card. B, C and E go on from A, so build A first.

    Examples:

        python -m trainer toy build --data runs/toy-data

        python -m trainer toy build --models A,B,C,D,E
    """
    from shared.errors import ConfigError
    from trainer.data import build_toy_data
    from trainer.toy.build import build_models

    console = Console()
    if data is None and not models:
        raise ConfigError("nothing to build; give --data FOLDER, --models A,B,C,D,E, or both")
    if data is not None:
        build_toy_data(data, console)
    if models:
        build_models(models.split(","), to, steps, console)


@app.command("tasks")
@friendly_errors
def tasks(
    data: Annotated[Path, typer.Option(help="Folder to write to, for data.source: jsonl.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks; empty: all.")] = "",
    train: Annotated[int, typer.Option(min=1, help="Training records per task.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Which records.")] = 0,
) -> None:
    """Write toy versions of the nine LIVR tasks: questions about one to three images that a text alone cannot answer.

    Records of named_shape and two_steps have auxiliary images, for method gap.

    counting, jigsaw, object_localization, visual_correspondence, art_style, semantic_correspondence,
    functional_correspondence, relative_reflectance, visual_similarity. Splits train, val (100 a task), test (500 a
    task); every answer is as frequent as any other, no scene is in two splits. Toy model E is the base for them.

    Example: python -m trainer toy tasks --data runs/toy-tasks --tasks jigsaw,counting
    """
    from trainer.data import build_toy_tasks

    build_toy_tasks(data, [name for name in tasks.split(",") if name], train, seed, Console())


@app.command("show")
@friendly_errors
def show(
    seed: Annotated[int, typer.Option(min=0, help="Which scene.")] = 0,
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("toy-scene.png"),
    task: Annotated[str, typer.Option(help="Show an example of this task, see `toy tasks`, instead.")] = "",
) -> None:
    """Draw one toy scene, enlarged, and print questions of every kind with their answers; or one example of a task."""
    from trainer.toy.show import show_scene, show_task

    if task:
        show_task(task, seed, to, Console())
    else:
        show_scene(seed, to, Console())
