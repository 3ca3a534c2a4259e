"""LIVR: layout, masks and logits against plain references; what the bottleneck lets through, by gradients; stages."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from anchor_service.pool import AnchorPool
from shared.config import GeneratorConfig, parse_config
from shared.errors import ConfigError
from shared.messages import Question
from shared.packing import block_mask
from shared.run_folder import trained_generator
from shared.vlm import ImageTokens
from shared.vlm.generator import Generator
from shared.vlm.lean import ATTENTION
from tests.integration.helpers import training_tree
from tests.reference import max_relative_error
from tests.tiny_models import WIDTH
from trainer import loop
from trainer.data.clevr import load_clevr
from trainer.data.records import KindQuestion, Record
from trainer.data.sampling import Batch
from trainer.evaluation.reading import Reader
from trainer.evaluation.run import evaluate_run
from trainer.evaluation.usage import SelfReading, _latent_cache, _mask_with_foreign_latents
from trainer.image_features import ImageFeatures
from trainer.loop import train_run
from trainer.methods import chosen_suites, with_checked_method
from trainer.methods.livr import (
    LivrMethod,
    LivrOptions,
    LivrReader,
    LivrRows,
    Role,
    bottleneck_mask,
)
from trainer.metrics import read_metrics
from trainer.report.write import write_report

K = 3
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
BOTTLENECKS = ("prompt_and_answer", "answer", "prompt_and_answer_and_latents_from_prompt")


def make_generator(folder: str) -> Generator:
    config = GeneratorConfig(model=folder, latents=K, device="cpu", lora={"rank": 4, "alpha": 8.0})
    generator = Generator(config, seed=0)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    generator.train(False)
    return generator


@pytest.fixture
def generator(tiny_folder, request) -> Generator:
    return make_generator(tiny_folder(request.param))


def images_of(generator: Generator, pictures, per_row=(2, 1, 1)) -> ImageTokens:
    """Rows of two, one and one images."""
    shown = [pictures[0], pictures[1], pictures[2], pictures[0]][: sum(per_row)]
    return generator.image_tokens_from(generator.model.image_inputs(shown)).in_rows(per_row)


def laid_out(generator: Generator, tokens: ImageTokens, questions, **options: Any) -> tuple[LivrReader, LivrRows]:
    reader = LivrReader(generator, LivrOptions(**options))
    return reader, reader.rows(tokens, questions, reader.latent_ids)


def plain_role(livr: LivrRows, generator: Generator, r: int, t: int) -> Role:
    """From the text alone: after the images, up to the latents, and from them on."""
    ids, segments = livr.rows.token_ids_BT[r].tolist(), livr.rows.segments_BT[r].tolist()
    if livr.rows.media_BT[r, t]:
        return Role.IMAGE
    if segments[t] < 1:
        return Role.TEXT
    own = [u for u in range(len(ids)) if segments[u] == segments[t]]
    latents = [u for u in own if ids[u] in generator.token_ids]
    return Role.LATENT if t in latents else Role.QUESTION if t < latents[0] else Role.ANSWER


def plain_mask(livr: LivrRows, generator: Generator, bottleneck: str | None) -> Tensor:
    """The table of the method, one pair of columns after the other."""
    n_rows, n = livr.rows.token_ids_BT.shape
    mask = torch.zeros(n_rows, 1, n, n, dtype=torch.bool)
    for r in range(n_rows):
        roles = [plain_role(livr, generator, r, t) for t in range(n)]
        segments = livr.rows.segments_BT[r].tolist()
        for q in range(n):
            for k in range(q + 1):
                sees = segments[k] in (0, segments[q]) and segments[k] != -1
                if roles[k] is Role.IMAGE and bottleneck is not None:
                    sees &= roles[q] in (Role.IMAGE, Role.LATENT) or (
                        bottleneck == "answer" and roles[q] != Role.ANSWER
                    )
                if bottleneck == "prompt_and_answer_and_latents_from_prompt":
                    sees &= not (roles[q] is Role.LATENT and roles[k] is Role.QUESTION)
                mask[r, 0, q, k] = sees or q == k
    return mask


@pytest.mark.parametrize("generator", FAMILIES, indirect=True)
@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_roles_and_masks_are_those_of_the_table(generator, pictures, questions, bottleneck):
    _, livr = laid_out(generator, images_of(generator, pictures), questions)
    n_rows, n = livr.roles_BT.shape
    assert [[plain_role(livr, generator, r, t) for t in range(n)] for r in range(n_rows)] == livr.roles_BT.tolist()
    assert torch.equal(bottleneck_mask(livr, bottleneck), plain_mask(livr, generator, bottleneck))
    assert torch.equal(block_mask(livr.rows.segments_BT), plain_mask(livr, generator, None))


def test_layout_in_words(tiny_folder):
    """The latents end the user's turn; before_prompt, they stand between image and question."""
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    question = [[Question("is there a red square?", "yes")]]
    images = ImageTokens([torch.zeros(4, WIDTH)], [(2, 2)])
    words = generator.model.processor.tokenizer.convert_ids_to_tokens
    for place, before, after in (
        ("after_prompt", "?", "<|im_end|>"),
        ("before_prompt", "<|vision_end|>", "is"),
    ):
        _, livr = laid_out(generator, images, question, place=place)
        ids = livr.rows.token_ids_BT[0].tolist()
        first = ids.index(generator.token_ids[1])
        assert ids[first : first + K] == generator.token_ids[1:-1]
        assert words([ids[first - 1], ids[first + K]]) == [before, after]
        roles = livr.roles_BT[0].tolist()
        assert roles[first : first + K] == [Role.LATENT] * K
        assert words(ids[-1]) == "yes"
        assert roles[-1] == Role.ANSWER
        assert roles[words(ids).index("is")] == Role.QUESTION
        header = words(ids).index("<|im_end|>", first)
        assert roles[header:] == [Role.ANSWER] * (len(ids) - header)
        predicting = livr.rows.predict_N2[:, 1].tolist()
        assert words(livr.rows.targets_N.tolist()) == ["yes", "<|im_end|>"]
        assert predicting == [len(ids) - 2, len(ids) - 1]
    _, shared = laid_out(generator, images, question, shared_row=True)
    assert shared.rows.token_ids_BT[0].tolist().count(generator.token_ids[1]) == K
    _, without = laid_out(generator, images, question, latents=False, stage1_share=0.0)
    assert without.roles_BT.shape[1] == livr.roles_BT.shape[1] - K


class EagerAttention:
    """Every layer's attention as a loop over rows, heads and queries, with the mask of the table."""

    def __init__(self, mask_B1TT: Tensor):
        self.mask = mask_B1TT

    def __call__(self, module, query, key, value, attention_mask, *, scaling, **_):
        n_groups = query.shape[1] // key.shape[1]
        out = torch.zeros_like(query)
        for b in range(query.shape[0]):
            for h in range(query.shape[1]):
                for t in range(query.shape[2]):
                    seen = self.mask[b, 0, t].nonzero().flatten()
                    weights = (scaling * (key[b, h // n_groups, seen] @ query[b, h, t])).softmax(-1)
                    out[b, h, t] = weights @ value[b, h // n_groups, seen]
        return out.transpose(1, 2), None


@pytest.mark.parametrize("generator", FAMILIES, indirect=True)
@pytest.mark.parametrize("bottleneck", [None, "prompt_and_answer", "prompt_and_answer_and_latents_from_prompt"])
@torch.no_grad()
def test_logits_equal_eager_attention_per_layer(generator, pictures, questions, bottleneck):
    tokens = images_of(generator, pictures)
    reader, livr = laid_out(generator, tokens, questions, bottleneck=bottleneck or "prompt_and_answer")
    fast = generator.hidden_states(livr.rows, tokens, reader.mask(livr, bottleneck is not None))
    AttentionInterface.register("eager_reference", EagerAttention(plain_mask(livr, generator, bottleneck)))
    generator.model.decoder.set_attn_implementation("eager_reference")
    slow = generator.hidden_states(livr.rows, tokens, reader.mask(livr, False))
    generator.model.decoder.set_attn_implementation(ATTENTION)
    head, bias = generator.model.head()
    used = livr.rows.segments_BT >= 0
    assert max_relative_error(F.linear(fast[used], head, bias), F.linear(slow[used], head, bias)) <= 1e-5


@pytest.mark.parametrize("generator", FAMILIES, indirect=True)
@torch.no_grad()
def test_left_padding_and_rows_of_single_questions_change_nothing(generator, pictures, questions):
    tokens = images_of(generator, pictures)
    reader, livr = laid_out(generator, tokens, questions)
    expected = reader.scores(livr, generator.hidden_states(livr.rows, tokens, reader.mask(livr, True))).logprobs_N

    rows = livr.rows
    n_left = 5
    moved = replace(
        rows,
        token_ids_BT=F.pad(rows.token_ids_BT, (n_left, 0)),
        segments_BT=F.pad(rows.segments_BT, (n_left, 0), value=-1),
        positions_3BT=F.pad(rows.positions_3BT, (n_left, 0)),
        media_BT=F.pad(rows.media_BT, (n_left, 0)),
        predict_N2=rows.predict_N2 + torch.tensor([0, n_left]),
    )
    padded = LivrRows(moved, F.pad(livr.roles_BT, (n_left, 0)))
    scores = reader.scores(padded, generator.hidden_states(moved, tokens, reader.mask(padded, True)))
    assert max_relative_error(scores.logprobs_N, expected) <= 1e-5

    alone = []
    for b, row in enumerate(questions):
        own = tokens.rows[b]
        inputs = [pictures[i % 3] for i in range(own.start, own.stop)]
        single = generator.image_tokens_from(generator.model.image_inputs(inputs)).in_rows([len(inputs)])
        for question in row:
            _, one = laid_out(generator, single, [[question]])
            hidden = generator.hidden_states(one.rows, single, reader.mask(one, True))
            alone.append(reader.scores(one, hidden).logprobs_N)
    assert max_relative_error(torch.cat(alone), expected) <= 1e-5


@pytest.mark.parametrize("generator", FAMILIES, indirect=True)
@pytest.mark.parametrize("is_cut", [False, True])
def test_in_stage_1_images_reach_answers_through_latents_alone(generator, pictures, questions, is_cut):
    """∂(answer)/∂(image) is zero once the latents' sight of the image is cut as well, and not zero before."""
    tokens = images_of(generator, pictures)
    for tensor in (*tokens.tokens, *tokens.deepstack):
        tensor.requires_grad_()
    reader, livr = laid_out(generator, tokens, questions)
    mask = bottleneck_mask(livr, "prompt_and_answer")
    if is_cut:
        to_image = (livr.roles_BT == Role.LATENT).unsqueeze(2) & (livr.roles_BT == Role.IMAGE).unsqueeze(1)
        mask &= ~to_image.unsqueeze(1)
    scores = reader.scores(livr, generator.hidden_states(livr.rows, tokens, mask))
    gradients = torch.autograd.grad(scores.logprobs_N.sum(), [*tokens.tokens, *tokens.deepstack], allow_unused=True)
    sizes = [0.0 if gradient is None else float(gradient.abs().max()) for gradient in gradients]
    if is_cut:
        assert max(sizes) == 0.0
    else:
        assert min(sizes[: len(tokens.tokens)]) > 0.0


def test_images_twice(tiny_folder, pictures):
    generator = make_generator(tiny_folder("qwen3_vl"))
    tokens = images_of(generator, pictures)
    twice = tokens.twice()
    assert twice.per_row == [4, 2, 2]
    assert [len(t) for t in twice.tokens] == [len(tokens.tokens[i]) for i in (0, 1, 0, 1, 2, 2, 3, 3)]
    layer, sizes = tokens.deepstack[0], [len(t) for t in tokens.tokens]
    parts = layer.split(sizes)
    assert torch.equal(twice.deepstack[0], torch.cat([parts[i] for i in (0, 1, 0, 1, 2, 2, 3, 3)]))


def tree(toy: Path, run_dir: Path, options: dict[str, Any], **train: Any) -> dict[str, Any]:
    settings = {"steps": 20, "validate_every": 10, "checkpoint_every": 10, **train}
    return {**training_tree(toy, run_dir, train=settings, method="livr", options=options), "anchors": []}


def test_stages_have_their_own_warm_up_and_cosine(toy_folder: Path, tmp_path: Path) -> None:
    config = parse_config(tree(toy_folder, tmp_path, {"stage1_share": 0.4}, steps=100, final_lr_share=0.1), "test")
    method = LivrMethod(config, Generator(config.generator, 0), AnchorPool([], config.pool, {}))
    for step in range(100):
        start, n = (0, 40) if step < 40 else (40, 60)
        warmup = n // 20
        done = step - start
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (n - warmup)))
        assert method.lr_share(step) == pytest.approx((done + 1) / warmup if done < warmup else cosine)
        assert method.starts_stage(step) == (step == 40)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"place": "before_prompt"},
        {"shared_row": True},
        {"image_twice": True},
        {"lora": False},
    ],
    ids=["livr", "before_prompt", "shared_row", "image_twice", "prompt_tuning"],
)
def test_every_variant_trains_and_learns_what_it_may(toy_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    config = with_checked_method(parse_config(tree(toy_folder, tmp_path / "run", options), "test"))
    assert train_run(config, resume=False)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["validation_loss"] < metrics[9]["validation_loss"] or options.get("lora") is False
    assert {entry["stage"] for entry in metrics} == ({2.0} if config.options["stage1_share"] == 0 else {1.0, 2.0})
    assert all(entry["tokens_per_image"] > 0 and entry["flops_per_image"] > 0 for entry in metrics)
    if options.get("lora") is False:
        store = Path(tmp_path / "run" / "checkpoints")
        state = load_file(next(store.glob("step-*20")) / "adapter_model.safetensors")
        assert all(not value.any() for name, value in state.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("sft", {"latents": False, "stage1_share": 0.0}),
        ("latents_only", {"latents": True, "stage1_share": 0.0}),
        ("mask_only", {"latents": False, "stage1_share": 0.4, "bottleneck": "answer"}),
    ],
)
def test_controls_train_and_are_evaluated(toy_folder: Path, tmp_path: Path, method: str, expected: dict) -> None:
    settings = {**tree(toy_folder, tmp_path / "run", {}), "method": method}
    config = with_checked_method(parse_config(settings, "test"))
    assert {name: config.options[name] for name in expected} == expected
    assert train_run(config, resume=False)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["validation_loss"] < metrics[9]["validation_loss"]
    assert {entry["stage"] for entry in metrics} == ({2.0} if expected["stage1_share"] == 0 else {1.0, 2.0})
    section = evaluate_run(config, Console(quiet=True), chosen_suites(config, None))["usage"]
    assert ("latents_removed" in section["conditions"]) == expected["latents"]
    assert ("attention_to_latents" in section) == expected["latents"]


def test_loss_is_the_mean_over_tokens_questions_and_records(toy_folder: Path, tmp_path: Path) -> None:
    config = with_checked_method(parse_config(tree(toy_folder, tmp_path, {}), "test"))
    generator = Generator(config.generator, 0)
    method = LivrMethod(config, generator, AnchorPool([], config.pool, {}))
    records = toy_records(toy_folder)[:3]
    questions = [list(record.questions[: b + 1]) for b, record in enumerate(records)]
    features = ImageFeatures(generator, None)
    tokens = features.of_records(records)
    parts = method.loss(method.emit(Batch(records, questions), tokens, 0), 0)
    reader = method.reader
    rows = []
    for b, record in enumerate(records):
        means = []
        for question in questions[b]:
            own = features.of_records([record])
            livr = reader.rows(own, [[question.message]], reader.latent_ids)
            hidden = generator.hidden_states(livr.rows, own, reader.mask(livr, True))
            means.append(-reader.scores(livr, hidden).logprobs_N.mean())
        rows.append(torch.stack(means).mean())
    assert parts.total.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)


def toy_records(toy: Path) -> list[Record]:
    return load_clevr(toy / "data", "test")


def test_a_resumed_run_is_bit_identical_across_the_stages(toy_folder: Path, tmp_path: Path, monkeypatch) -> None:
    whole = with_checked_method(
        parse_config(tree(toy_folder, tmp_path / "whole", {}, steps=12, checkpoint_every=3), "t")
    )
    train_run(whole, resume=False)
    half = with_checked_method(parse_config(tree(toy_folder, tmp_path / "half", {}, steps=12, checkpoint_every=3), "t"))
    real = loop.Trainer.step

    def step_until_7(self, step):
        if step == 7:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step_until_7)
        with pytest.raises(KeyboardInterrupt):
            train_run(half, resume=False)
    assert train_run(half, resume=True)
    losses = [[e["loss"] for e in read_metrics(tmp_path / name)] for name in ("whole", "half")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_anchors_read_each_questions_latents(toy_folder: Path, tmp_path: Path) -> None:
    """The bridge's part of the loss equals a read of the latents in this process, and its gradient arrives."""
    settings = tree(toy_folder, tmp_path, {"anchor_weight": 0.5, "stage1_share": 0.0})
    anchors = training_tree(toy_folder, tmp_path)["anchors"]
    config = with_checked_method(parse_config({**settings, "anchors": anchors}, "test"))
    generator = Generator(config.generator, 0)
    records = toy_records(toy_folder)[:2]
    batch = Batch(records, [list(record.questions[:2]) for record in records])
    with AnchorPool.start(config, generator.handshake()) as pool:
        method = LivrMethod(config, generator, pool)
        tokens = ImageFeatures(generator, None).of_records(records)
        parts = method.loss(method.emit(batch, tokens, 0), 0)
        weights = pool.weights()
    multi = sum(weights[name] * parts.terms[f"nll/{name}"] for name in ("A", "B"))
    assert parts.total.item() == pytest.approx(parts.terms["nll"] + 0.5 * multi, rel=1e-5)
    assert set(parts.replies) == {"A", "B"}
    assert [len(row) for row in parts.replies["A"].logprobs] == [1] * 4
    alone = torch.autograd.grad(parts.total, generator.lora_parameters)
    assert max(float(g.abs().max()) for g in alone) > 0


def usage_of(generator: Generator, records: list[Record], **options: Any) -> SelfReading:
    reader = LivrReader(generator, LivrOptions(**options))
    return SelfReading(reader, ImageFeatures(generator, None), records, batch_images=3, seed=1)


@torch.no_grad()
def test_usage_conditions_against_plain_passes(toy_folder: Path, tmp_path: Path) -> None:
    config = parse_config(tree(toy_folder, tmp_path, {}), "test")
    generator = Generator(config.generator, 0)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    generator.train(False)
    records = [replace(r, questions=r.questions[: 1 + b % 3]) for b, r in enumerate(toy_records(toy_folder)[:5])]
    usage = usage_of(generator, records)
    reader, features = usage.reader, usage.features

    def plain(record: Record, question: KindQuestion, latent_ids: list[int], is_bottleneck: bool, images: bool = True):
        tokens = features.of_records([record]) if images else ImageTokens([], [], [], [0])
        livr = reader.rows(tokens, [[question.message]], latent_ids)
        hidden = generator.hidden_states(livr.rows, tokens, reader.mask(livr, is_bottleneck))
        return -reader.scores(livr, hidden).logprobs_N.mean().item()

    ids = reader.latent_ids
    pairs = [(record, question) for record in records for question in record.questions]
    for condition, arguments in {
        "normal": (ids, False),
        "latents_removed": ([], False),
        "bottleneck": (ids, True),
        "both": ([], True),
        "floor": (ids, False, False),
    }.items():
        expected = [plain(record, question, *arguments) for record, question in pairs]
        assert usage.read(condition).nll_N.tolist() == pytest.approx(expected, rel=1e-4), condition
    nll = {condition: usage.read(condition).nll_N for condition in usage.conditions}
    assert len(nll) == 6
    for condition in ("latents_removed", "bottleneck", "both", "other_images", "floor"):
        assert abs(nll[condition] - nll["normal"]).max() > 1e-3, condition


@torch.no_grad()
def test_the_batch_size_of_the_usage_test_changes_no_number(toy_folder: Path, tmp_path: Path) -> None:
    """Records of one to three questions, so that rows are padded otherwise in every batch."""
    generator = Generator(parse_config(tree(toy_folder, tmp_path, {}), "test").generator, 0)
    records = [replace(r, questions=r.questions[: 1 + b % 3]) for b, r in enumerate(toy_records(toy_folder)[:5])]
    usage = usage_of(generator, records)
    one_by_one = replace(usage, batch_images=1)
    for condition in usage.conditions:
        outcome, alone = usage.read(condition), one_by_one.read(condition)
        assert outcome.hits_N.tolist() == alone.hits_N.tolist(), condition
        assert outcome.nll_N == pytest.approx(alone.nll_N, rel=1e-4), condition
    assert usage.attention_to_latents() == pytest.approx(one_by_one.attention_to_latents(), rel=1e-4)


@torch.no_grad()
def test_latents_of_the_same_image_swap_to_nothing(toy_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """With each record's own image as the other one, the two-pass reading equals the plain one; with another, not."""
    config = parse_config(tree(toy_folder, tmp_path, {}), "test")
    generator = Generator(config.generator, 0)
    records = [replace(r, questions=r.questions[: 1 + b % 3]) for b, r in enumerate(toy_records(toy_folder)[:5])]
    usage = usage_of(generator, records)
    normal, swapped = usage.read("normal").nll_N, usage.read("other_images").nll_N
    assert abs(swapped - normal).max() > 1e-4
    monkeypatch.setattr("trainer.evaluation.usage.derangement", lambda n, seed: torch.arange(n).numpy())
    assert usage.read("other_images").nll_N == pytest.approx(normal, rel=1e-5)


@torch.no_grad()
def test_swapped_latents_are_those_of_the_other_image_in_every_layer(toy_folder: Path, tmp_path: Path) -> None:
    """One-token answers behind the bottleneck: all that is left of the own image is nothing, so the swap is a plain
    pass about the other image in which question and answer do not see it."""
    config = parse_config(tree(toy_folder, tmp_path, {}), "test")
    generator = Generator(config.generator, 0)
    usage = usage_of(generator, toy_records(toy_folder)[:4])
    reader = usage.reader
    first, second = usage.records[0], usage.records[1]
    question = [[first.questions[0].message]]
    other = reader.rows(usage.features.of_records([second]), question, reader.latent_ids)
    tokens = usage.features.of_records([second])
    behind = reader.scores(other, generator.hidden_states(other.rows, tokens, reader.mask(other, True))).logprobs_N

    everything = DynamicCache()
    generator.hidden_states(other.rows, tokens, reader.mask(other, True), everything)
    cache, owner = _latent_cache(everything, other)
    own_tokens = usage.features.of_records([first])
    livr = reader.rows(own_tokens, question, reader.latent_ids)
    mask = _mask_with_foreign_latents(livr, owner)
    mask[..., owner.shape[1] :] &= reader.mask(livr, True)
    swapped = reader.scores(livr, generator.hidden_states(livr.rows, own_tokens, mask, cache)).logprobs_N
    assert max_relative_error(swapped, behind) <= 1e-5


@torch.no_grad()
def test_attention_share_against_all_weights(toy_folder: Path, tmp_path: Path) -> None:
    config = parse_config(tree(toy_folder, tmp_path, {}), "test")
    generator = Generator(config.generator, 0)
    records = toy_records(toy_folder)[:4]
    usage = usage_of(generator, records)
    shares = usage.attention_to_latents()
    assert len(shares) == sum(len(record.questions) for record in records)
    tokens = usage.features.of_records(records[:1])
    livr = usage.reader.rows(tokens, [[records[0].questions[0].message]], usage.reader.latent_ids)
    weights = []
    sdpa = AttentionInterface()["sdpa"]

    def watch(module, query, key, value, mask, *, scaling, **rest):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = scaling * query @ keys.mT + mask
        weights.append(scores.softmax(-1)[0])
        return sdpa(module, query, key, value, mask, scaling=scaling, **rest)

    AttentionInterface.register("watched", watch)
    generator.model.decoder.set_attn_implementation("watched")
    generator.hidden_states(livr.rows, tokens, usage.reader.mask(livr, False))
    generator.model.decoder.set_attn_implementation(ATTENTION)
    predicting = int(livr.rows.predict_N2[0, 1])
    expected = torch.stack(weights)[:, :, predicting, livr.roles_BT[0] == Role.LATENT].sum(-1).mean()
    assert shares[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"latents": False, "lora": False}, "lora: false without latents leaves nothing to learn"),
        ({"latents": False}, "without latents leaves the answer no way to the images; use answer"),
        ({"stage1_share": 1.0}, "stage1_share: input should be less than 1"),
    ],
)
def test_options_that_contradict_each_other(toy_folder: Path, tmp_path: Path, options, expected) -> None:
    with pytest.raises(ConfigError, match=expected):
        with_checked_method(parse_config(tree(toy_folder, tmp_path, options), "test"))


def test_suites_of_a_method(toy_folder: Path, tmp_path: Path) -> None:
    livr = parse_config(tree(toy_folder, tmp_path, {}), "test")
    anchored = parse_config(training_tree(toy_folder, tmp_path), "test")
    assert chosen_suites(livr, None) == ["usage"]
    assert chosen_suites(livr, "all") == ["usage", "geometry"], "no anchor could be asked"
    with pytest.raises(ConfigError, match="--suite causal: the run has no anchor; name one in anchors"):
        chosen_suites(livr, "causal")
    read = parse_config({**tree(toy_folder, tmp_path, {}), "anchors": anchored_tree(toy_folder, tmp_path)}, "test")
    assert chosen_suites(read, "all") == ["usage", "reading", "causal", "geometry"]
    assert chosen_suites(anchored, None) == ["reading"]
    assert "usage" not in chosen_suites(anchored, "all")
    with pytest.raises(ConfigError, match="--suite controls: not for method livr; use one of usage, reading, causal"):
        chosen_suites(livr, "controls")
    with pytest.raises(ConfigError, match="anchor_weight: there is no anchor to weigh"):
        LivrMethod(
            parse_config(tree(toy_folder, tmp_path, {"anchor_weight": 1}), "test"),
            Generator(livr.generator, 0),
            AnchorPool([], livr.pool, {}),
        )


def anchored_tree(toy: Path, run_dir: Path) -> list[dict[str, Any]]:
    return training_tree(toy, run_dir)["anchors"]


def test_anchors_are_asked_about_one_question_of_each_record(toy_folder: Path, tmp_path: Path) -> None:
    """Suites of `anchored` on latents that belong to a question: against plain reads of the same questions."""
    options = {"anchor_weight": 0.5, "stage1_share": 0.0}
    settings = {**tree(toy_folder, tmp_path / "run", options, steps=4, checkpoint_every=4)}
    config = parse_config({**settings, "anchors": anchored_tree(toy_folder, tmp_path)}, "t")
    config = with_checked_method(config)
    train_run(config, resume=False)
    result = evaluate_run(config, Console(quiet=True), ["reading", "causal", "geometry"], other_run=tmp_path / "run")

    generator = trained_generator(config)
    records = toy_records(toy_folder)[:4]
    rng = np.random.default_rng(config.train.seed)
    asked = [replace(r, questions=(r.questions[rng.integers(len(r.questions))],)) for r in records]
    reader, features = LivrReader(generator, LivrOptions(**options)), ImageFeatures(generator, None)
    latents = []
    for record in asked:
        tokens = features.of_records([record])
        livr = reader.rows(tokens, [[record.questions[0].message]], reader.latent_ids)
        latents.append(reader.latents(livr, generator.hidden_states(livr.rows, tokens, reader.mask(livr, False))))
    with AnchorPool.start(config, generator.handshake()) as pool:
        outcome = Reader(pool, asked, config).latents(torch.cat(latents).detach())["A"]
    assert result["anchors"]["A"]["latents"]["n"] == 4
    assert result["anchors"]["A"]["nll"]["latents"]["value"] == pytest.approx(outcome.nll_N.mean(), rel=1e-4)
    assert result["causal"]["A"]["verdict"] in ("used", "partly used", "inert")
    assert result["geometry"]["figures"]["slot_cosine"]["n"] == 4
    assert result["against"][str(tmp_path / "run")]["cka"] == pytest.approx(1.0, abs=1e-5)


def test_runs_without_latents_of_images_are_not_compared(toy_folder: Path, tmp_path: Path) -> None:
    settings = {**tree(toy_folder, tmp_path / "run", {}, steps=2, checkpoint_every=2), "method": "sft"}
    config = with_checked_method(parse_config(settings, "t"))
    train_run(config, resume=False)
    with pytest.raises(ConfigError, match="--against: method sft has no K latents of each record"):
        evaluate_run(config, Console(quiet=True), ["usage"], other_run=tmp_path / "run")


def test_evaluation_writes_and_prints_the_usage_test(toy_folder: Path, tmp_path: Path, capsys) -> None:
    config = with_checked_method(parse_config(tree(toy_folder, tmp_path / "run", {}, steps=4, checkpoint_every=4), "t"))
    train_run(config, resume=False)
    evaluate_run(config, Console(width=160), ["usage"])
    section = json.loads((tmp_path / "run" / "evaluation.json").read_text())["usage"]
    assert list(section["conditions"]) == ["normal", "latents_removed", "bottleneck", "both", "other_images", "floor"]
    assert section["conditions"]["normal"]["delta_accuracy"]["value"] == 0
    assert set(section["kinds"]) == {q.kind for r in toy_records(toy_folder)[:4] for q in r.questions}
    assert 0 < section["attention_to_latents"]["value"] < 1
    shown = capsys.readouterr().out
    assert "Usage test on 4 unseen records" in shown
    assert "latents removed" in shown
    page = write_report([tmp_path / "run"], "mean").read_text()
    assert "Usage test" in page
    assert "of the attention where an answer" in page
    assert (tmp_path / "run" / "report" / "usage.png").stat().st_size > 5000
    assert "causal suite" not in page, "suites that have nobody to ask are not missed"
    assert "the geometry suite; measure it" in page
