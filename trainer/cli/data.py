"""Verbs about data: check, livr, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from shared.cli import ConfigOption, SetOption, friendly_errors

app = typer.Typer(no_args_is_help=True, help="Look at a config's data before anything is trained on it.")


@app.command("check")
@friendly_errors
def check(
    config: ConfigOption,
    set_: SetOption = None,
    images: Annotated[int, typer.Option(min=0, help="Images to open per split, evenly spread; 0: all.")] = 2000,
    to: Annotated[Path, typer.Option(help="Folder for the page and for what was learnt of images.")] = Path(
        "runs/data-check"
    ),
) -> None:
    """Count, open images, tokenize answers; print tables and write TO/data.html with a grid of samples.

    Damaged records and broken images are counted and named whatever data.on_error says; so are images that stand in two
    splits, and answers without tokens. What always giving the commonest answer reaches is the bar for everything else.
    May be interrupted: what was learnt of images stays in TO/images.jsonl, by content.

    Example: python -m trainer data check --config deploy/configs/toy.yaml
    """
    from shared.config import load_config
    from trainer.data import prepare_data
    from trainer.data.check import check_data
    from trainer.report.data_page import print_check, write_page

    console = Console()
    resolved = load_config(Path(config), set_ or [])
    prepare_data(resolved.data, console)
    found = check_data(resolved, images, to / "images.jsonl")
    print_check(found, console)
    console.print(f"page: {write_page(found, to)}", highlight=False, soft_wrap=True)


@app.command("livr")
@friendly_errors
def livr(
    task: Annotated[
        str, typer.Option(help="counting, jigsaw, object_localization, visual_correspondence, art_style, …")
    ],
    raw: Annotated[Path, typer.Option(help="Folder of the raw data set, as it is published.")],
    to: Annotated[Path, typer.Option(help="Folder to write train.jsonl, val.jsonl and images/ to.")],
    train: Annotated[int, typer.Option(min=1, help="Training records; the paper takes 1,000.")] = 1000,
    val: Annotated[int, typer.Option(min=1, help="Validation records.")] = 250,
    exclude: Annotated[
        Path | None, typer.Option(help="Folder of a test set's images; whatever looks like one of them is left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images and options.")] = 0,
) -> None:
    """Build the data of one of LIVR's nine tasks from COCO, PixMo-Count, HPatches, ArtBench-10, SPair-71k, FunKPoint,
    Multi-Illumination or NIGHTS. No raw image is in two splits; options are shuffled.

    Example: python -m trainer data livr --task jigsaw --raw data/coco --to data/jigsaw --exclude data/blink-images
    """
    from trainer.data.livr_tasks import build_task
    from trainer.data.livr_tasks.perceptual_hash import seen_images

    console = Console()
    test_set = seen_images(exclude)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(task, total=train + val)
        report = build_task(
            task,
            raw,
            to,
            {"train": train, "val": val},
            test_set,
            seed,
            lambda done, _: bar.update(shown, completed=done),
        )
    written = ", ".join(f"{split} {n}" for split, n in report.written.items())
    console.print(
        f"{task}: {written} records in {to}; left out: {report.in_test_set} like one of the test set's {len(test_set)} "
        f"images, {report.in_other_split} with an image of another split",
        highlight=False,
        soft_wrap=True,
    )


@app.command("show")
@friendly_errors
def show(
    config: ConfigOption,
    set_: SetOption = None,
    split: Annotated[str | None, typer.Option(help="By default the training split.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many records.")] = 3,
    seed: Annotated[int, typer.Option(help="Which records are drawn.")] = 0,
) -> None:
    """Print records with their prompts exactly as the generator and each anchor see them, decoded from token ids.

    Each record comes with its questions of one kind; anchors that read the same text share a line.

    Example: python -m trainer data show --config deploy/configs/toy.yaml --n 2
    """
    from shared.config import load_config
    from trainer.data import prepare_data
    from trainer.data.show import show_data

    console = Console()
    resolved = load_config(Path(config), set_ or [])
    prepare_data(resolved.data, console)
    show_data(resolved, split or resolved.data.train_split, n, seed, console)
