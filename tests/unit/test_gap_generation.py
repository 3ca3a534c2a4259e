"""Responses written in batches against one that recomputes every position of one row at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.vlm import GrowingRows
from tests.reference import max_relative_error, plain_prompt
from tests.unit.test_gap_autoregressive import QUESTIONS, grown, head_of, question_ids
from trainer.gap.generation import LatentSpans, Sampler, Written, generate, greedy
from trainer.gap.response import PLACEHOLDER

LIMIT = 10


def plain_write(model, picture, question, spans: LatentSpans, end_ids: list[int], choose, row: int) -> Written:
    """One row: after each piece, everything is read again from the start; positions and mask by hand."""
    written = Written()
    places: list[list[int]] = []
    inputs: list[Tensor] = []
    open_with, began = None, 0
    tokens, ids = model.image_tokens([picture]), question_ids(model, question)
    for step in range(LIMIT):
        rows = GrowingRows.after_images(model, tokens)
        rows.append_tokens([ids])
        start = int(rows.next_B)
        if inputs:
            rows.append(torch.stack(inputs)[None], start + torch.tensor(places).T[:, None])
        weight, bias = model.head()
        logits_1V = rows.hidden_BD @ weight.T + (0 if bias is None else bias)
        token = int(choose(logits_1V, [row], step))
        following = 1 + max((max(place) for place in places), default=-1)
        if open_with is not None:
            closes = open_with == spans.n_latents or (spans.closing == "generated" and token == spans.close_id)
            if not closes:
                latent_D = spans.head(rows.hidden_BD)[0]
                if spans.norms_B is not None:
                    latent_D = latent_D * spans.norms_B[row] / latent_D.norm()
                side = round(spans.n_latents**0.5)
                at = [0, open_with // side, open_with % side] if spans.on_grid else [open_with] * 3
                places.append([began + x for x in at])
                inputs.append(latent_D)
                written.pieces.append(latent_D)
                open_with += 1
                continue
            token, open_with = spans.close_id, None
        elif token in end_ids:
            written.ended = True
            return written
        elif token == spans.open_id:
            open_with, began = 0, following + 1
        places.append([following] * 3)
        inputs.append(model.embed(torch.tensor(token)))
        written.pieces.append(token)
    return written


def assert_same(written: Written, reference: Written) -> None:
    assert written.ended == reference.ended
    assert len(written.pieces) == len(reference.pieces)
    for piece, expected in zip(written.pieces, reference.pieces, strict=True):
        assert type(piece) is type(expected)
        if isinstance(piece, int):
            assert piece == expected
        else:
            assert max_relative_error(piece, expected) <= 1e-8


def sampled(model, pictures, spans, end_ids, seed: int) -> list[Written]:
    rows = grown(model, pictures, QUESTIONS)
    return generate(rows, end_ids, LIMIT, Sampler([seed, seed + 1, seed + 2], 1.0, LIMIT), spans)


def frequent_tokens(model, pictures) -> list[int]:
    """What the random model writes most, so that spans open, close and turns end within a few steps."""
    never = LatentSpans(-1, -1, head_of("mlp"), 4)
    counts: dict[int, int] = {}
    for seed in range(2):
        for one in sampled(model, pictures, never, [-1], seed):
            for piece in one.pieces:
                counts[piece] = counts.get(piece, 0) + 1
    return sorted(counts, key=lambda token: -counts[token])


@pytest.mark.parametrize("closing", ["budget", "generated"])
@pytest.mark.parametrize(("family", "on_grid"), [("qwen2_5_vl", True), ("qwen3_vl", False), ("llava_onevision", False)])
@torch.no_grad()
def test_equals_rows_written_alone_with_everything_recomputed(tiny_model, pictures, family, on_grid, closing):
    model = tiny_model(family, "float64")
    open_id, close_id, *end_ids = frequent_tokens(model, pictures)[:5]
    norms_B = torch.tensor([2.0, 5.0, 3.0], dtype=torch.float64) if closing == "budget" else None
    spans = LatentSpans(open_id, close_id, head_of("pca"), 4, closing, on_grid, norms_B)
    n_spans, lengths, ended = 0, set(), 0
    for seed in (0, 3):
        rows = sampled(model, pictures, spans, end_ids, seed)
        sampler = Sampler([seed, seed + 1, seed + 2], 1.0, LIMIT)
        for b, written in enumerate(rows):
            assert_same(written, plain_write(model, pictures[b], QUESTIONS[b], spans, end_ids, sampler, b))
            ended += written.ended
            pieces = ["L" if isinstance(piece, Tensor) else piece for piece in written.pieces]
            n_spans += pieces.count(open_id)
            lengths.add(pieces.count("L"))
    assert n_spans > 0
    assert ended > 0
    assert max(lengths) >= (4 if closing == "budget" else 1)


@torch.no_grad()
def test_a_budget_is_kept_and_closed(tiny_model, pictures):
    """Every first token opens a span: exactly K latents follow, then the closing token, chosen or not."""
    model = tiny_model("qwen2_5_vl")
    opening = 7

    def choose(logits_BV: Tensor, _rows, step: int) -> Tensor:
        return torch.full((len(logits_BV),), opening if step == 0 else 9)

    rows = grown(model, pictures, QUESTIONS)
    for written in generate(rows, [9], 9, choose, LatentSpans(opening, 8, head_of("mlp").float(), 4)):
        kinds = ["L" if isinstance(piece, Tensor) else piece for piece in written.pieces]
        assert kinds == [opening, "L", "L", "L", "L", 8]
        assert written.ended
        tokenizer = model.processor.tokenizer
        expected = tokenizer.decode([opening]) + 4 * PLACEHOLDER + tokenizer.decode([8])
        assert written.text(tokenizer) == expected


@torch.no_grad()
def test_greedy_equals_hugging_face_generation(tiny_model, pictures):
    model = tiny_model("qwen2_5_vl", "float64")
    writtens = generate(grown(model, pictures, QUESTIONS), [-1], 8, greedy)
    for b, written in enumerate(writtens):
        n_image = len(model.image_tokens([pictures[b]]).tokens[0])
        prompt = plain_prompt(model, QUESTIONS[b], n_image)
        ids = prompt.input_ids[:, : -prompt.n_answer]
        inputs = model.image_inputs([pictures[b]])
        is_image = (ids == model.image_token_id).int()
        output = model.hf_model.generate(
            input_ids=ids,
            mm_token_type_ids=is_image,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            pixel_values=inputs["pixel_values"].double(),
            image_grid_thw=inputs["image_grid_thw"],
        )
        assert written.pieces == output[0, ids.shape[1] :].tolist()
        assert not written.ended


def test_the_sampler_draws_from_the_distribution():
    logits_1V = torch.tensor([[2.0, 0.0, -1.0, -torch.inf, 1.0]])
    n = 20_000
    sampler = Sampler(range(n), 0.7, 1)
    drawn = sampler(logits_1V.expand(n, -1), range(n), 0)
    shares_V = torch.bincount(drawn, minlength=5) / n
    expected_V = (logits_1V[0] / 0.7).softmax(-1)
    assert (shares_V - expected_V).abs().max() <= 4 * (0.25 / n) ** 0.5
    assert shares_V[3] == 0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**60), order=st.permutations(range(5)), temperature=st.floats(0.01, 10))
def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(seed, order, temperature):
    logits_BV = 10 * torch.randn(5, 40, generator=torch.Generator().manual_seed(seed % 1000))
    sampler = Sampler([seed + b for b in range(5)], temperature, 3)
    together_B = sampler(logits_BV, range(5), 2)
    shuffled_B = sampler(logits_BV[list(order)], order, 2)
    assert torch.equal(shuffled_B, together_B[list(order)])
    alone = Sampler([seed + order[0]], temperature, 3)(logits_BV[order[0]][None], [0], 2)
    assert alone[0] == together_B[order[0]]
    assert ((together_B >= 0) & (together_B < 40)).all()


def test_a_draw_at_the_end_of_the_scale_takes_a_possible_token():
    sampler = Sampler([0], 1.0, 1)
    sampler._draws_BT = torch.tensor([[1.0]], dtype=torch.float64)
    logits_1V = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    assert sampler(logits_1V, [0], 0).tolist() == [1]
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampler([0], 0.0, 1)
