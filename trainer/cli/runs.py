"""Verbs about runs: train, evaluate, sweep, summarise, report, estimate."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from shared.cli import ConfigOption, SetOption, friendly_errors

app = typer.Typer()


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
    from shared.run_folder import run_config
    from trainer.data import prepare_data
    from trainer.evaluation.run import evaluate_run
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
    calibrate_norm: Annotated[
        bool,
        typer.Option("--calibrate-norm", help="Rescale latents to the norm of visual embeddings."),
    ] = False,
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
    from shared.run_folder import run_config
    from trainer.data import prepare_data
    from trainer.evaluation.run import chosen_anchors, evaluate_run
    from trainer.methods import chosen_suites

    console = Console()
    config = run_config(run)
    if calibrate_norm and config.evaluation.norm_calibration is None:
        config = run_config(run, ["evaluation.norm_calibration={}"])
    suites = chosen_suites(config, suite)
    names = [name for name in anchors.split(",") if name]
    prepare_data(config.data, console)
    readers = config.evaluation.transfer if "transfer" in suites else ()
    with ray_if_needed(config, (*chosen_anchors(config, names), *readers)):
        evaluate_run(config, console, suites, names, against)


@app.command()
@friendly_errors
def sweep(
    config: ConfigOption,
    grid: Annotated[
        list[str] | None, typer.Option(help="field=value,value; may be repeated. K stands for generator.latents.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each point, with train.seed 0, 1, …")] = 3,
    to: Annotated[
        Path, typer.Option(help="Folder of the sweep: trials/, results.json, results.csv, results.png.")
    ] = Path("runs/sweep"),
    cpus_per_trial: Annotated[
        float | None, typer.Option(min=0.1, help="CPUs of each trial's own process; by default generator.cpus, or 1.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train and evaluate every point of a grid with several seeds, as many at a time as the machine or cluster holds.

    One table: mean over seeds with a 95 % interval. Failed runs are shown, the others go on. Call it again to go on
    where it was stopped: finished runs are kept, others resume. Every run folder is one like any other. Exit status 1
    if a run failed.

    Example: python -m trainer sweep --config deploy/configs/livr/toy.yaml --grid method=livr,sft --grid K=4,9 --seeds 3
    """
    from trainer.sweep.run import SweepOptions, run_sweep

    console = Console()
    options = SweepOptions(Path(config), set_ or [], grid or [], seeds, to, cpus_per_trial)
    if any(outcome.figures is None for outcome in run_sweep(options, console)):
        raise typer.Exit(1)


@app.command()
@friendly_errors
def summarise(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one config with different seeds.")],
    to: Annotated[Path | None, typer.Option(help="JSON file to write, with every run's figures, too.")] = None,
) -> None:
    """Mean over seeds with a 95 % interval (Student's) of the headline figures of evaluated runs.

    The runs must be of one config but for train.seed and run.dir; what differs is named. Figures come from the suites
    that RUN/evaluation.json holds.

    Example: python -m trainer summarise runs/seed0 runs/seed1 runs/seed2 --to runs/summary.json
    """
    from trainer.sweep.summary import summarise_runs

    summarise_runs(runs, Console(), to)


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
