"""Method gap: its loss against a response read piece by piece, which questions get latents, a run, its evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.errors import ConfigError, DataError
from shared.vlm import GrowingRows
from shared.vlm.generator import Generator
from tests.integration.helpers import REPOSITORY
from trainer.data.jsonl import load_jsonl
from trainer.data.records import Record
from trainer.data.sampling import Batch
from trainer.difficulty import Difficulty
from trainer.difficulty.labels import LabelFolder
from trainer.evaluation.run import evaluate_run
from trainer.gap.autoregressive import latent_positions
from trainer.gap.heads import PcaHead
from trainer.gap.pca import IncrementalPca
from trainer.image_features import ImageFeatures
from trainer.loop import train_run
from trainer.methods import with_checked_method
from trainer.methods.gap import GapMethod
from trainer.toy.tasks.dataset import ensure_tasks

MODEL = str(REPOSITORY / "trainer/toy/models/A")
K, D = 4, 64
WEIGHT = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with auxiliary images, and the subspace of random vectors."""
    root = tmp_path_factory.mktemp("gap")
    ensure_tasks(root / "data", ["named_shape", "two_steps"], {"train": 12, "val": 6, "test": 6})
    pca = IncrementalPca(D)
    pca.update(torch.randn(500, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, D))
    pca.fit(0.95).save(root / "pca.safetensors")
    return root


def config_of(folder: Path, run: Path, **options: Any) -> Config:
    tree = {
        "method": "gap",
        "options": {"pca": str(folder / "pca.safetensors"), "form": "short", "latent_weight": WEIGHT, **options},
        "run": {"dir": str(run)},
        "generator": {"model": MODEL, "latents": K, "dtype": "float32", "device": "cpu", "lora": {"rank": 4}},
        "data": {"source": "jsonl", "path": str(folder / "data"), "questions_per_image": 1},
        "train": {"steps": 4, "batch_images": 4, "checkpoint_every": 2, "validate_every": 2, "validate_images": 8},
        "evaluation": {"images": 12},
        "logging": {"tensorboard": False},
    }
    return with_checked_method(parse_config(tree, "test"))


def method_of(config: Config) -> GapMethod:
    return GapMethod(config, Generator(config.generator, 0), AnchorPool([], config.pool, {}))


def batch_of(folder: Path, n: int = 3) -> tuple[list[Record], Batch]:
    records = list(load_jsonl(folder / "data", "train"))[:n]
    return records, Batch(records, [list(record.questions) for record in records])


def tokens_of(method: GapMethod, records: list[Record]) -> Any:
    features = ImageFeatures(method._generator, None)
    return features.of_records([method.seen(record) for record in records])


def plain_terms(method: GapMethod, record: Record) -> tuple[float, float, int]:
    """NLL summed over a response's words, squared errors of its latents' coefficients summed over K, words."""
    model, layout = method._generator.model, method.layout
    tokens = tokens_of(method, [record])
    own, auxiliary = tokens.picked([[0]]), tokens.picked([[1]])
    height = width = 3  # image tokens of toy model A
    grid = auxiliary.tokens[0].reshape(height, width, D)
    pooled_KD = torch.nn.functional.adaptive_avg_pool2d(grid.permute(2, 0, 1), (2, 2)).flatten(1).T
    (question,) = record.questions
    assert record.auxiliary is not None
    text = f"{record.auxiliary.description}, {question.answer}"
    opening, end_id = model.prompt.opening(question.text)
    words = [*model.prompt.tokenizer(text, add_special_tokens=False)["input_ids"], end_id]
    rows = GrowingRows.after_images(model, own)
    rows.append_tokens([opening])
    weight, bias = model.head()

    def nll(token: int) -> float:
        logits_V = (rows.hidden_BD @ weight.T + (0 if bias is None else bias))[0]
        return -float(logits_V.log_softmax(-1)[token])

    head = method.head
    assert isinstance(head, PcaHead)
    total = nll(layout.open_id)
    rows.append_tokens([[layout.open_id]])
    error = 0.0
    start = int(rows.next_B)
    for k in range(K):
        error += float(
            (method.head.coefficients(rows.hidden_BD) - method.head.target(pooled_KD[k : k + 1])).square().sum()
        )  # type: ignore[operator]
        position_311 = (start + latent_positions(K, on_grid=True)[:, k])[:, None, None]
        rows.append(pooled_KD[None, k : k + 1], position_311)
    rows.append_tokens([[layout.close_id]])
    for word in words:
        total += nll(word)
        rows.append_tokens([[word]])
    return total, error, 1 + len(words)


def test_the_loss_is_that_of_responses_read_piece_by_piece(folder: Path, tmp_path: Path) -> None:
    method = method_of(config_of(folder, tmp_path))
    records, batch = batch_of(folder)
    with torch.no_grad():
        taught = method.emit(batch, tokens_of(method, records), 0)
        terms = [plain_terms(method, record) for record in records]
    parts = method.loss(taught, 0)
    nll = sum(total / n_words for total, _, n_words in terms) / len(records)
    latent = sum(error for _, error, _ in terms) / (K * len(records)) / float(method.head.variance)  # type: ignore[arg-type]
    assert parts.terms["nll"] == pytest.approx(nll, rel=1e-4)
    assert parts.terms["latent"] == pytest.approx(latent, rel=1e-4)
    assert parts.terms["loss"] == pytest.approx(nll + WEIGHT * latent, rel=1e-4)
    assert parts.terms["spans"] == 3


def test_the_checkpoint_is_chosen_by_latents_too(folder: Path, tmp_path: Path) -> None:
    method = method_of(config_of(folder, tmp_path))
    records, batch = batch_of(folder)
    with torch.no_grad():
        loss = method.loss(method.emit(batch, tokens_of(method, records), 0), 0).terms["loss"]
    features = ImageFeatures(method._generator, None)
    assert method.validation_loss(features, records) == pytest.approx(loss, rel=1e-5)


def test_records_are_validated_in_the_likelier_form_where_both_are_taught(folder: Path, tmp_path: Path) -> None:
    """The head's row for the opening token is that of an answer, so that some records are likelier with a span."""
    LabelFolder(tmp_path / "labels", {}).finish()
    records = list(load_jsonl(folder / "data", "train"))
    configs = [config_of(folder, tmp_path, supervise=form) for form in ("everywhere", "nowhere")]
    configs.append(config_of(folder, tmp_path, supervise="failed", difficulty=str(tmp_path / "labels")))
    methods = [method_of(config) for config in configs]
    for method in methods:
        weight_VD, _ = method._generator.model.head()
        with torch.no_grad():
            weight_VD[method.layout.open_id] = 2 * weight_VD[method.layout.prompt.tokenizer.get_vocab()["circle"]]
    *alone, both = methods
    expected, likelier = 0.0, []
    for record in records:
        batch = Batch([record], [list(record.questions)])
        with torch.no_grad():
            terms = [m.loss(m.emit(batch, tokens_of(m, [record]), 0), 0).terms for m in alone]
        likelier.append(min((0, 1), key=lambda form: terms[form]["nll"]))
        expected += terms[likelier[-1]]["loss"] / len(records)
    assert set(likelier) == {0, 1}
    features = ImageFeatures(both._generator, None)
    assert both.validation_loss(features, records) == pytest.approx(expected, rel=1e-5)


def test_latents_are_taught_where_the_base_failed(folder: Path, tmp_path: Path) -> None:
    method = method_of(config_of(folder, tmp_path))
    records, batch = batch_of(folder)
    tokens = tokens_of(method, records)
    rights = [0, 3, 0]
    labels = {
        (record.record_id, record.questions[0].text): Difficulty(right, 8)
        for record, right in zip(records, rights, strict=True)
    }
    method._labels = labels
    assert method.emit(batch, tokens, 0).n_spans == 2
    method._labels = {}
    with pytest.raises(DataError, match=r"no label for .* label this split"):
        method.emit(batch, tokens, 0)
    words = method_of(config_of(folder, tmp_path, supervise="nowhere"))
    assert words.emit(batch, tokens, 0).n_spans == 0
    with pytest.raises(ConfigError, match="supervise: failed needs difficulty"):
        config_of(folder, tmp_path, supervise="failed")


def test_a_run_is_trained_and_evaluated(folder: Path, tmp_path: Path) -> None:
    whole = config_of(folder, tmp_path / "whole")
    assert train_run(whole, resume=False)
    evaluate_run(whole, Console(quiet=True), ["usage"])
    usage = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["usage"]
    assert set(usage["conditions"]) == {"normal", "calibrated", "latents_removed", "other_images"}
    assert 0 <= usage["norms"]["spans"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all({"nll", "latent", "spans"} <= line.keys() for line in lines[:4])
    assert all(line["tokens_per_image"] > K and line["flops_per_image"] > 0 for line in lines[:4])


def test_data_without_auxiliary_images_is_refused(folder: Path, tmp_path: Path) -> None:
    method = method_of(config_of(folder, tmp_path))
    records, _ = batch_of(folder)
    with pytest.raises(DataError, match=r"no record has an auxiliary image.* use method sft"):
        method.prepare(ImageFeatures(method._generator, None), [replace(record, auxiliary=None) for record in records])
