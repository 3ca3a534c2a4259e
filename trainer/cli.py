"""Command line of the trainer. Each verb loads what it needs, so `--help` answers at once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from shared.cli import ConfigOption, SetOption, friendly_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train visual latents against frozen anchors, and find out whether they carry the answer.",
)
toy_app = typer.Typer(no_args_is_help=True, help="The toy world: build its data and models, look at a scene.")
app.add_typer(toy_app, name="toy")
data_app = typer.Typer(no_args_is_help=True, help="Look at a config's data before anything is trained on it.")
app.add_typer(data_app, name="data")


@app.command()
@friendly_errors
def train(
    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML file, see deploy/configs.")] = None,
    set_: SetOption = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with; its own config is used.")] = None,
    evaluate_after: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Evaluate when training is done.")
    ] = True,
) -> None:
    """Train a generator through its anchors, then evaluate it.

    Writes config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and evaluation.json into run.dir. SIGTERM
    writes a checkpoint after the running step and exits with 0; --resume goes on bit for bit.

    Examples:

        python -m trainer train --config deploy/configs/toy.yaml --set run.dir=runs/mine

        python -m trainer train --resume runs/mine
    """
    from anchor_service.cluster import ray_if_needed
    from shared.config import dump_config, load_config
    from shared.errors import ConfigError
    from trainer.data import prepare_data
    from trainer.evaluation.run import evaluate_run, run_config
    from trainer.loop import train_run
    from trainer.methods import chosen_suites, with_checked_method

    console = Console()
    if (config is None) == (resume is None):
        raise ConfigError("give either --config FILE for a new run or --resume RUN to go on with one")
    if resume is not None and set_:
        raise ConfigError("--resume uses the run's own config; --set would make it another run")
    resolved = with_checked_method(
        run_config(resume) if resume is not None else load_config(Path(str(config)), set_ or [])
    )
    console.print(dump_config(resolved), style="dim", highlight=False)
    prepare_data(resolved.data, console)
    anchors = resolved.all_anchors if evaluate_after else resolved.anchors
    with ray_if_needed(resolved, anchors):
        finished = train_run(resolved, resume=resume is not None)
        if finished and evaluate_after:
            evaluate_run(resolved, console, chosen_suites(resolved, None))
    console.print(f"run folder: {resolved.run.dir}", highlight=False)


class Suite(enum.StrEnum):
    """What `evaluate` measures."""

    READING = "reading"
    CAUSAL = "causal"
    CONTROLS = "controls"
    GEOMETRY = "geometry"
    TRANSFER = "transfer"
    BENCHMARKS = "benchmarks"
    USAGE = "usage"
    ALL = "all"


@app.command()
@friendly_errors
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that train wrote.")],
    suite: Annotated[Suite | None, typer.Option(help="What to measure; by default the method's first suite.")] = None,
    anchors: Annotated[str, typer.Option(help="Comma-separated anchors of the run; empty: all, unseen ones too.")] = "",
    against: Annotated[Path | None, typer.Option(help="Another run: how alike its latents are (linear CKA).")] = None,
) -> None:
    """Measure what each anchor answers from the latents, and whether it is the latents that tell it.

    reading: ceiling (real image), latents, latents of another image, no latents; for anchors of training and unseen
    ones, in all and per kind of question. causal: the latents' content is zeroed, replaced by noise, swapped, cut;
    with a verdict. controls: the image is replaced or disturbed. geometry: how the latents lie, slot by slot.
    transfer: readers of another family, through a projector fitted on training images (evaluation.transfer).
    benchmarks: public benchmarks from local files (evaluation.benchmarks), answers by likelihood, official metrics.
    usage: of models that answer by themselves: without latents, behind the bottleneck, with other images' latents.
    all: every suite that the run's method has.

    All with 95 % intervals over images. Writes RUN/evaluation.json; goes on where it was interrupted.

    Examples:

        python -m trainer evaluate runs/demo

        python -m trainer evaluate runs/demo --suite all --anchors A,C
    """
    from anchor_service.cluster import ray_if_needed
    from trainer.data import prepare_data
    from trainer.evaluation.run import chosen_anchors, evaluate_run, run_config
    from trainer.methods import chosen_suites

    console = Console()
    config = run_config(run)
    suites = chosen_suites(config, suite)
    names = [name for name in anchors.split(",") if name]
    prepare_data(config.data, console)
    readers = config.evaluation.transfer if "transfer" in suites else ()
    with ray_if_needed(config, (*chosen_anchors(config, names), *readers)):
        evaluate_run(config, console, suites, names, against)


@app.command()
@friendly_errors
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that evaluate was run on; the first gets the page.")],
    attention: Annotated[
        Literal["mean", "last", "rollout"],
        typer.Option(help="Attention maps: mean of all layers and heads, the last layer's heads, or rollout."),
    ] = "mean",
    model: Annotated[
        bool, typer.Option(help="Load each run's generator for attention maps, state space and norms by layer.")
    ] = True,
) -> None:
    """Draw what was measured: one HTML file that needs no network, and its pictures as PNGs.

    Writes RUN/report.html and RUN/report/*.png; several runs stand side by side. Suites that were not run are named
    at the end of the page with their command.

    Example: python -m trainer report runs/demo
    """
    from trainer.report.write import write_report

    page = write_report(runs, attention, with_model=model)
    Console().print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command()
@friendly_errors
def estimate(
    config: ConfigOption,
    set_: SetOption = None,
    device: Annotated[
        str | None, typer.Option(help="GPU to plan for: A6000, L40S, A100, H100, H200. By default this machine's.")
    ] = None,
) -> None:
    """Predict memory of every process, time of a step and what limits it, before any weight is loaded.

    Example: python -m trainer estimate --config deploy/configs/a6000.yaml --device A6000
    """
    from shared.config import load_config
    from trainer.estimate import print_estimate

    print_estimate(load_config(Path(config), set_ or []), Console(), device)


@data_app.command("check")
@friendly_errors
def data_check(
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


@data_app.command("show")
@friendly_errors
def data_show(
    config: ConfigOption,
    set_: SetOption = None,
    split: Annotated[str | None, typer.Option(help="By default the training split.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many records.")] = 3,
    seed: Annotated[int, typer.Option(help="Which records are drawn.")] = 0,
) -> None:
    """Print records with their prompts exactly as the generator and each anchor see them, decoded from token ids.

    Example: python -m trainer data show --config deploy/configs/toy.yaml --n 2
    """
    from shared.config import load_config
    from trainer.data import prepare_data
    from trainer.data.show import show_data

    console = Console()
    resolved = load_config(Path(config), set_ or [])
    prepare_data(resolved.data, console)
    show_data(resolved, split or resolved.data.train_split, n, seed, console)


@toy_app.command("build")
@friendly_errors
def toy_build(
    models: Annotated[str, typer.Option(help="Comma-separated models to train: A,B,C,D. Empty: none.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder to write the toy data set to.")] = None,
    to: Annotated[Path, typer.Option(help="Folder that gets one folder per model.")] = Path("trainer/toy/models"),
    steps: Annotated[int | None, typer.Option(help="Train each model for this many steps instead of its own.")] = None,
) -> None:
    """Write the toy data set (CLEVR v1.0 format), or train the tiny models that ship with the project.

    Models are trained on their own images, apart from every split of the data set, and evaluated on 500 unseen
    scenes; the figures go into each model's card. B and C go on from A, so build A first.

    Examples:

        python -m trainer toy build --data runs/toy-data

        python -m trainer toy build --models A,B,C,D
    """
    from shared.errors import ConfigError
    from trainer.data import build_toy_data
    from trainer.toy.build import build_models

    console = Console()
    if data is None and not models:
        raise ConfigError("nothing to build; give --data FOLDER, --models A,B,C,D, or both")
    if data is not None:
        build_toy_data(data, console)
    if models:
        build_models(models.split(","), to, steps, console)


@toy_app.command("show")
@friendly_errors
def toy_show(
    seed: Annotated[int, typer.Option(help="Which scene.")] = 0,
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("toy-scene.png"),
) -> None:
    """Draw one toy scene, enlarged, and print questions of every kind with their answers."""
    from trainer.toy.show import show_scene

    show_scene(seed, to, Console())
