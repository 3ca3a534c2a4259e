"""Verbs about a model and a data set, without training: norms, pca, difficulty."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from shared.cli import SetOption, friendly_errors

app = typer.Typer()

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
    vllm: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with vLLM, which then samples.", exists=True)
    ] = None,
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
    workers = Workers(actors, cpus, gpus, vllm=None if vllm is None else str(vllm.absolute()))
    console = Console()
    split = split or data_config.train_split
    labelled = label_split(model, dtype, data_config, split, sampling, workers, to, console, save_every_s)
    print_labels(labelled, threshold, console)
    console.print(f"labels: {to}", highlight=False, soft_wrap=True)
