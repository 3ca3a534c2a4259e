"""Command line of the trainer. Each verb loads what it needs, so `--help` answers at once."""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

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
    where it was stopped: finished runs are kept, others resume. Every run folder is one like any other.

    Example: python -m trainer sweep --config deploy/configs/livr/toy.yaml --grid method=livr,sft --grid K=4,9 --seeds 3
    """
    from trainer.sweep.run import SweepOptions, run_sweep

    console = Console()
    options = SweepOptions(Path(config), set_ or [], grid or [], seeds, to, cpus_per_trial)
    run_sweep(options, console)


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


_MODEL = typer.Option("--model", help="Hugging Face folder or hub name.")
_DATA = typer.Option("--data", help="Folder of a data set.")
SourceOption = Annotated[str, typer.Option(help="Layout of --data, see data.source.")]
DtypeOption = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: the first GPU if there is one.")]


@app.command()
@friendly_errors
def norms(
    model: Annotated[str | None, _MODEL] = None,
    data: Annotated[Path | None, _DATA] = None,
    source: SourceOption = "clevr",
    run: Annotated[Path | None, typer.Option(help="Run folder: its trained model, data and latents instead.")] = None,
    split: Annotated[str | None, typer.Option(help="By default val, or the test split of the run.")] = None,
    images: Annotated[int, typer.Option(min=1, help="First n records of the split.")] = 64,
    pca: Annotated[Path | None, typer.Option(help="With --run: latents projected onto it, too.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder to write to; by default runs/norms, or the run.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Measure how much longer hidden states are than input embeddings, layer by layer, for text and for images.

    With --run also the run's latents: as they are, after norm calibration, and projected onto a PCA of visual
    embeddings. Prints a table of mean L2 norms and writes norms.json and norms.png.

    Examples:

        python -m trainer norms --model trainer/toy/models/A --data runs/toy-data

        python -m trainer norms --run runs/demo --pca runs/pca.safetensors
    """
    from shared.config import DataConfig
    from shared.errors import ConfigError
    from shared.run_folder import run_config
    from trainer.data import load_records
    from trainer.gap.norms import norms_of_model, norms_of_run, print_norms, write_norms
    from trainer.progress import track

    console = Console()
    with_bar = functools.partial(track, console=console, description="norms")
    if run is not None:
        if model is not None or data is not None:
            raise ConfigError("--run brings its own model and data; leave --model and --data out")
        config = run_config(run)
        records = load_records(config.data, split or config.data.test_split)[:images]
        result = norms_of_run(config, records, with_bar, pca)
    elif model is None or data is None:
        raise ConfigError("give --model MODEL and --data FOLDER, or --run RUN")
    else:
        records = load_records(DataConfig(source=source, path=data), split or "val")[:images]
        result = norms_of_model(model, records, with_bar, dtype, device)
    folder = to or run or Path("runs/norms")
    write_norms(result, folder)
    print_norms(result, console)
    console.print(f"written: {folder / 'norms.json'}, {folder / 'norms.png'}", highlight=False, soft_wrap=True)


@app.command()
@friendly_errors
def pca(
    model: Annotated[str, _MODEL],
    data: Annotated[Path, _DATA],
    source: SourceOption = "clevr",
    to: Annotated[Path, typer.Option(help="File to write, safetensors.")] = Path("runs/pca.safetensors"),
    split: Annotated[str, typer.Option(help="Split of the data.")] = "train",
    images: Annotated[int, typer.Option(min=1, help="First n records of the split.")] = 1000,
    variance: Annotated[float, typer.Option(min=0.01, max=0.9999, help="Share of the variance to keep.")] = 0.95,
    components: Annotated[int | None, typer.Option(min=1, help="Keep this many directions instead.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Fit a PCA to a model's visual input embeddings: the subspace in which a PCA head writes its latents.

    Images pass by one after the other; memory is that of one width × width matrix.

    Example: python -m trainer pca --model trainer/toy/models/A --data runs/toy-data
    """
    from shared.config import DataConfig
    from shared.vlm import load_vlm
    from shared.vlm.generator import resolve_device
    from trainer.data import load_records
    from trainer.gap.norms import fit_pca
    from trainer.progress import track

    console = Console()
    records = load_records(DataConfig(source=source, path=data), split)[:images]
    vlm = load_vlm(model, dtype, resolve_device(device)).freeze()
    fitted = fit_pca(vlm, track(records, console, "pca"), variance, components)
    to.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(to)
    console.print(
        f"{fitted.n_components} of {fitted.width} directions hold {fitted.explained_share:.2%} of the variance of "
        f"{fitted.n_vectors} visual embeddings: {to}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@friendly_errors
def difficulty(
    config: Annotated[str | None, typer.Option("--config", "-c", help="Its generator's model and its data.")] = None,
    set_: SetOption = None,
    model: Annotated[str | None, _MODEL] = None,
    data: Annotated[Path | None, _DATA] = None,
    source: SourceOption = "clevr",
    split: Annotated[str | None, typer.Option(help="By default the config's train_split.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the labels; one that is unfinished is gone on with.")] = Path(
        "runs/difficulty"
    ),
    samples: Annotated[int, typer.Option(min=1, max=1024, help="Answers per question.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, max=100, help="Of the sampling.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, max=8192, help="Longer answers count as wrong.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threshold: Annotated[int, typer.Option(min=0, help="Most right answers of a question that gets latents.")] = 0,
    rows: Annotated[
        int, typer.Option(min=1, help="Answers sampled at a time by one actor; lower it to save memory.")
    ] = 64,
    actors: Annotated[int, typer.Option(min=1, help="Engines side by side.")] = 1,
    cpus: Annotated[float, typer.Option(min=0.01, help="CPUs of each actor.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each actor; 0 runs on the CPU.")] = 0.0,
    save_every_s: Annotated[float, typer.Option(min=0.0, help="Seconds between two parts on disk.")] = 30.0,
) -> None:
    """Label every question by how many of n sampled answers of the base model are exactly right.

    A batch job on Ray Data. Labels are written in parts: a job that was interrupted goes on with what is left when it
    is started again. Training reads them with `trainer.difficulty.load_difficulty`.

    Examples:

        python -m trainer difficulty --config deploy/configs/toy.yaml --to runs/toy-difficulty

        python -m trainer difficulty --model trainer/toy/models/A --data runs/toy-data --split val --samples 8
    """
    from shared.config import DataConfig, load_config
    from shared.errors import ConfigError
    from trainer.difficulty.engine import SamplingConfig
    from trainer.difficulty.job import Workers, label_split, print_labels

    if config is not None and model is None and data is None:
        resolved = load_config(Path(config), set_ or [])
        model, dtype, data_config = resolved.generator.model, resolved.generator.dtype, resolved.data
    elif config is None and model is not None and data is not None:
        dtype, data_config = "float32" if gpus == 0 else "bfloat16", DataConfig(source=source, path=data)
    else:
        raise ConfigError("give either --config FILE, or --model MODEL and --data FOLDER")
    sampling = SamplingConfig(samples=samples, temperature=temperature, max_tokens=max_tokens, seed=seed, rows=rows)
    workers = Workers(actors, cpus, gpus)
    console = Console()
    split = split or data_config.train_split
    labelled = label_split(model, dtype, data_config, split, sampling, workers, to, console, save_every_s)
    print_labels(labelled, threshold, console)
    console.print(f"labels: {to}", highlight=False, soft_wrap=True)


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


@data_app.command("livr")
@friendly_errors
def data_livr(
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


@toy_app.command("tasks")
@friendly_errors
def toy_tasks(
    data: Annotated[Path, typer.Option(help="Folder to write to, for data.source: jsonl.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks; empty: all nine.")] = "",
    train: Annotated[int, typer.Option(min=1, help="Training records per task.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Which records.")] = 0,
) -> None:
    """Write toy versions of the nine LIVR tasks: questions about one to three images that a text alone cannot answer.

    counting, jigsaw, object_localization, visual_correspondence, art_style, semantic_correspondence,
    functional_correspondence, relative_reflectance, visual_similarity. Splits train, val (100 a task), test (500 a
    task); every answer is as frequent as any other, no scene is in two splits. Toy model E is the base for them.

    Example: python -m trainer toy tasks --data runs/toy-tasks --tasks jigsaw,counting
    """
    from trainer.data import build_toy_tasks

    build_toy_tasks(data, [name for name in tasks.split(",") if name], train, seed, Console())


@toy_app.command("show")
@friendly_errors
def toy_show(
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
