"""How long inputs and hidden states are: the mismatch that makes a hidden state a bad input.

A decoder's residual stream grows from layer to layer, so a hidden state that is fed back as an input embedding is
much longer than the embeddings that the decoder knows as inputs. Measured by kind of token (text, image): input
embeddings, the output of every layer, and the state after the final norm, which is what would be fed back.

Legend: B rows, T row length, D width, K latents, L layers, N vectors.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.config import Config, NormCalibrationConfig
from shared.packing import PADDING
from shared.reading import pack_questions
from shared.run_folder import trained_generator
from shared.vlm import ImageTokens, VisionLanguageModel, load_vlm
from shared.vlm.generator import resolve_device
from shared.vlm.hidden import hidden_states
from trainer.data.records import Record
from trainer.gap.pca import IncrementalPca, VisualPca, load_pca
from trainer.norm_calibration import NormCalibration
from trainer.report.drawing import curves, draw

Track = Callable[[Sequence[Record]], Iterable[Record]]
"""Iterates over records with a progress bar."""
Norms = dict[str, float]
"""Figures of a set of vectors: `mean` and `median` L2 norm, `n` vectors."""
INPUT, FINAL = "input", "final norm"


@torch.no_grad()
def visual_embeddings(model: VisionLanguageModel, record: Record) -> ImageTokens:
    """Visual input embeddings of a record's images, as one row. Raises DataError naming an image that is damaged."""
    images = record.load_images()
    return model.image_tokens(images).in_rows([len(images)])


def fit_pca(
    model: VisionLanguageModel, records: Iterable[Record], variance: float, n_components: int | None
) -> VisualPca:
    """PCA of the visual input embeddings of records, which pass by one after the other."""
    pca = IncrementalPca(model.width)
    for record in records:
        pca.update(torch.cat(visual_embeddings(model, record).tokens))
    return pca.fit(variance, n_components)


@torch.no_grad()
def measure_norms(model: VisionLanguageModel, records: Iterable[Record]) -> dict[str, dict[str, Norms]]:
    """By place (`input`, `layer 1` …, `final norm`) and kind of token (`text`, `image`).

    Text is all of a conversation but its images: template, every question of the record, every answer.
    """
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    # Record by record: what lies together in memory are norms, one number a token.
    for record in records:
        tokens = visual_embeddings(model, record)
        rows = pack_questions(model, tokens.media, [[question.message for question in record.questions]])
        with hidden_states(model.decoder) as layers:
            final_BTD = model.decode(rows, torch.cat(tokens.tokens), tokens.deepstack)
        is_text_BT = ~rows.media_BT & (rows.segments_BT != PADDING)
        names = [INPUT, *(f"layer {i}" for i in range(1, len(layers))), FINAL]
        for name, states_BTD in zip(names, [*layers, final_BTD], strict=True):
            norms_BT = states_BTD.float().norm(dim=-1).cpu()
            found[name]["text"].append(norms_BT[is_text_BT.cpu()])
            found[name]["image"].append(norms_BT[rows.media_BT.cpu()])
    return {name: {kind: _figures(norms) for kind, norms in kinds.items()} for name, kinds in found.items()}


@torch.no_grad()
def measure_latents(
    emit: Callable[[ImageTokens], Tensor],
    model: VisionLanguageModel,
    records: Iterable[Record],
    calibration: NormCalibrationConfig,
    pca: VisualPca | None = None,
) -> dict[str, Norms]:
    """Norms of latents as `emit` gives them (B, K, D), after calibration, and after projection if there is a PCA."""
    calibrate = NormCalibration(calibration)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for record in records:
        tokens = visual_embeddings(model, record)
        latents_BKD = emit(tokens)
        variants = {"latents": latents_BKD, "latents, calibrated": calibrate(latents_BKD, tokens)}
        if pca is not None:
            variants["latents, projected"] = pca.project(latents_BKD)
        for name, variant_BKD in variants.items():
            found[name].append(variant_BKD.float().norm(dim=-1).flatten().cpu())
    return {name: _figures(norms) for name, norms in found.items()}


def norms_of_model(path: str, records: Sequence[Record], track: Track, dtype: str, device: str) -> dict[str, Any]:
    """What `norms --model` writes. Raises ModelError."""
    model = load_vlm(path, dtype, resolve_device(device)).freeze()
    return {"model": path, "records": len(records), "states": measure_norms(model, track(records)), "latents": {}}


def norms_of_run(config: Config, records: Sequence[Record], track: Track, pca_file: Path | None) -> dict[str, Any]:
    """What `norms --run` writes: of the trained model, and its latents. Raises CheckpointError or ModelError."""
    generator = trained_generator(config)
    generator.train(False)
    model = generator.model
    pca = None if pca_file is None else load_pca(pca_file, model.width)
    calibration = config.evaluation.norm_calibration or NormCalibrationConfig()
    return {
        "model": f"{model.path} of {config.run.dir}",
        "records": len(records),
        "states": measure_norms(model, track(records)),
        "latents": measure_latents(generator.emit, model, track(records), calibration, pca),
    }


def write_norms(result: dict[str, Any], folder: Path) -> None:
    """norms.json with every figure, norms.png with the means over the layers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "norms.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    places = list(result["states"])
    series = {
        f"{kind} tokens": {float(i): (result["states"][place][kind]["mean"],) * 3 for i, place in enumerate(places)}
        for kind in ("text", "image")
    }
    series |= {name: {float(len(places)): (figures["mean"],) * 3} for name, figures in result["latents"].items()}
    ends = f"0: input embeddings, {len(places) - 1}: after the final norm"
    label = f"layer ({ends}, {len(places)}: latents)" if result["latents"] else f"layer ({ends})"
    marks = tuple(result["latents"])
    light, _ = draw(lambda theme: curves(theme, series, label, "mean L2 norm", log=True, marks_only=marks))
    (folder / "norms.png").write_bytes(light)


def print_norms(result: dict[str, Any], console: Console) -> None:
    """The table: means, and how many times the input embeddings of the same kind they are."""
    inputs = {kind: figures["mean"] for kind, figures in result["states"][INPUT].items()}
    table = Table("", "text", "× input", "image", "× input", title=f"Mean L2 norms · {result['model']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for place, kinds in result["states"].items():
        cells = [(kinds[kind]["mean"], kinds[kind]["mean"] / inputs[kind]) for kind in ("text", "image")]
        table.add_row(place, *(f"{number:.4g}" for cell in cells for number in cell))
    if result["latents"]:
        table.add_section()
    for name, figures in result["latents"].items():
        table.add_row(name, "", "", f"{figures['mean']:.4g}", f"{figures['mean'] / inputs['image']:.4g}")
    console.print(table)


def _figures(norms: Sequence[Tensor]) -> Norms:
    norms_N = torch.cat(list(norms)).double()
    return {"mean": float(norms_N.mean()), "median": float(norms_N.median()), "n": len(norms_N)}
