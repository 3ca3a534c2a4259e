"""Packed rows give the numbers of ordinary, one-question-at-a-time Hugging Face forwards."""

from __future__ import annotations

import random

import pytest
import torch

from shared.messages import Question
from shared.packing import PADDING, PREFIX, Branch, Media, block_mask, latent_media, pack_rows, unpack
from shared.reading import pack_questions, score_answers
from shared.vlm import CachedPrefix, Prompt, load_vlm
from tests.reference import max_relative_error, plain_read_all, plain_read_image, plain_read_images
from tests.tiny_models import FAMILY_NAMES, WIDTH

N_LATENTS = 9
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES = [(family, False) for family in FAMILY_NAMES] + [(family, True) for family in MROPE_FAMILIES]


def flat(logprobs) -> torch.Tensor:
    return torch.cat([tokens for row in logprobs for tokens in row])


@pytest.mark.parametrize("cache_prefix", [False, True], ids=["prefix in the rows", "prefix cached"])
@pytest.mark.parametrize(("family", "on_grid"), CASES)
def test_latents_log_probs_and_gradient(tiny_model, questions, family, on_grid, cache_prefix):
    model = tiny_model(family)
    latents_BKD = 2 * torch.randn(len(questions), N_LATENTS, WIDTH, generator=torch.Generator().manual_seed(1))
    latents_BKD.requires_grad_()
    weights_N = torch.rand(
        sum(len(q.answer) for row in questions for q in row), generator=torch.Generator().manual_seed(3)
    )

    reference_N = flat(plain_read_all(model, latents_BKD, questions, on_grid))
    (reference_grad,) = torch.autograd.grad((reference_N * weights_N[: len(reference_N)]).sum(), latents_BKD)

    rows = pack_questions(model, [[latent_media(N_LATENTS, on_grid)]] * len(questions), questions, cache_prefix)
    prefix = CachedPrefix(model) if cache_prefix else None
    scores = score_answers(model, rows, latents_BKD.flatten(0, 1), prefix=prefix)
    (grad,) = torch.autograd.grad((scores.logprobs_N * weights_N[: len(reference_N)]).sum(), latents_BKD)

    assert max_relative_error(scores.logprobs_N, reference_N) <= 1e-5
    assert max_relative_error(grad, reference_grad) <= 1e-5
    # The comparison means something only if latents matter and answers are not certain.
    assert reference_grad.abs().amax(dim=(1, 2)).min() > 1e-3
    assert reference_N.max() < -1e-3


@pytest.mark.parametrize("trial", range(6))
def test_random_rows(tiny_model, trial):
    """Any K, one to eight questions an image, ragged lengths; leaving a branch out changes no other branch."""
    rng = random.Random(trial)
    model, on_grid = tiny_model("qwen2_5_vl"), trial % 2 == 0
    n_latents = rng.choice([1, 4, 16]) if on_grid else rng.randint(1, 17)
    n_images = rng.randint(1, 4)
    words = ["red", "blue", "circle", "square", "left", "top", "how", "many", "things", "is", "there"]

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    questions = [[Question(text(9), text(4)) for _ in range(rng.randint(1, 8))] for _ in range(n_images)]
    latents_BKD = torch.randn(n_images, n_latents, WIDTH, generator=torch.Generator().manual_seed(trial))
    latents_BKD.requires_grad_()
    prefix = CachedPrefix(model)

    def read(asked):
        rows = pack_questions(model, [[latent_media(n_latents, on_grid)]] * n_images, asked, cache_prefix=True)
        scores = score_answers(model, rows, latents_BKD.flatten(0, 1), prefix=prefix)
        return unpack(list(scores.logprobs_N), scores.counts)

    packed = flat([torch.stack(q) for q in row] for row in read(questions))
    reference = flat(plain_read_all(model, latents_BKD, questions, on_grid))
    assert max_relative_error(packed, reference) <= 1e-5
    (grad,) = torch.autograd.grad(-packed.sum(), latents_BKD)
    (reference_grad,) = torch.autograd.grad(-reference.sum(), latents_BKD)
    assert max_relative_error(grad, reference_grad) <= 1e-5

    image = max(range(n_images), key=lambda b: len(questions[b]))
    left_out = rng.randrange(len(questions[image]))
    fewer = [[q for i, q in enumerate(row) if (b, i) != (image, left_out)] for b, row in enumerate(questions)]
    expected = plain_read_all(model, latents_BKD, fewer, on_grid)
    assert max_relative_error(flat([torch.stack(q) for q in row] for row in read(fewer)), flat(expected)) <= 1e-5


@torch.no_grad()
def test_cached_prefix_follows_template_and_dtype(tiny_folder, questions):
    model = load_vlm(tiny_folder("qwen2_5_vl")).freeze()
    prefix = CachedPrefix(model)

    def read(cached):
        rows = pack_questions(model, [[]] * len(questions), questions, cache_prefix=cached)
        return score_answers(model, rows, None, prefix=prefix if cached else None).logprobs_N

    first = read(True)
    computed = prefix._layers
    assert torch.equal(read(True), first)
    assert prefix._layers is computed, "a second read must not compute the prefix again"

    processor = model.processor
    model.prompt = Prompt(
        processor.tokenizer, processor.chat_template, model.family, "<|image_pad|>", system_line="is there a red square"
    )
    assert max_relative_error(read(True), read(False)) <= 1e-5
    assert max_relative_error(read(True), first) > 1e-3, "the new template must change the numbers"

    model.hf_model.double()
    assert read(True).dtype is torch.float64
    # The norms of transformers go through float32 even in a float64 model.
    assert max_relative_error(read(True), read(False)) <= 1e-6


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_real_images_equal_the_ordinary_forward(tiny_model, questions, pictures, family):
    model = tiny_model(family)
    tokens = model.image_tokens(pictures)
    rows = pack_questions(model, tokens.media, questions, cache_prefix=True)
    scores = score_answers(model, rows, torch.cat(tokens.tokens), tokens.deepstack, CachedPrefix(model))
    reference = [
        [plain_read_image(model, picture, len(tokens.tokens[b]), q) for q in questions[b]]
        for b, picture in enumerate(pictures)
    ]
    assert max_relative_error(scores.logprobs_N, flat(reference)) <= 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_several_images_equal_the_ordinary_forward(tiny_model, questions, pictures, family):
    """Rows of two, one and three images of different shapes, in one batch."""
    model = tiny_model(family)
    shown = [pictures[:2], pictures[2:], [pictures[1], pictures[2], pictures[0]]]
    tokens = model.image_tokens([picture for row in shown for picture in row]).in_rows([2, 1, 3])
    rows = pack_questions(model, tokens.media, questions, cache_prefix=True)
    scores = score_answers(model, rows, torch.cat(tokens.tokens), tokens.deepstack, CachedPrefix(model))
    counts = [[len(t) for t in tokens.tokens[row]] for row in tokens.rows]
    reference = [
        [plain_read_images(model, shown[b], counts[b], question) for question in row] for b, row in enumerate(questions)
    ]
    assert max_relative_error(scores.logprobs_N, flat(reference)) <= 1e-5


@torch.no_grad()
def test_deepstack_features_matter(tiny_model, questions, pictures):
    """Without this the comparison above could pass with features that do nothing."""
    model = tiny_model("qwen3_vl")
    tokens = model.image_tokens(pictures)
    assert len(tokens.deepstack) == 2
    rows = pack_questions(model, tokens.media, questions)
    with_them = score_answers(model, rows, torch.cat(tokens.tokens), tokens.deepstack).logprobs_N
    without = score_answers(model, rows, torch.cat(tokens.tokens)).logprobs_N
    assert max_relative_error(without, with_them) > 1e-3


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_no_media_is_the_prompt_without_image_tokens(tiny_model, questions, family):
    model = tiny_model(family)
    scores = score_answers(model, pack_questions(model, [[]] * len(questions), questions), None)
    assert max_relative_error(scores.logprobs_N, flat(plain_read_all(model, None, questions))) <= 1e-5


@torch.no_grad()
def test_images_without_media_beside_images_with_media(tiny_model, questions):
    model = tiny_model("qwen2_5_vl")
    latents_KD = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    rows = pack_questions(model, [[], [Media(4, (2, 2))], []], questions)
    scores = score_answers(model, rows, latents_KD)
    reference = plain_read_all(model, None, questions)
    reference[1] = plain_read_all(model, latents_KD[None], [questions[1]], on_grid=True)[0]
    assert max_relative_error(scores.logprobs_N, flat(reference)) <= 1e-5


def test_block_mask_against_loops():
    branches = [[Branch((7, 8, 9), 1), Branch((7, 8), 1)], [Branch((5, 6, 7, 8, 9), 2)], [Branch((3, 4), 1)] * 4]
    rows = pack_rows([1, 2], [[Media(4, (2, 2))], [], [Media(1)]], branches)
    segments = rows.segments_BT.tolist()
    assert any(PADDING in row for row in segments)
    mask_B1TT = block_mask(rows.segments_BT)
    for b, row in enumerate(segments):
        for i, query in enumerate(row):
            for j, key in enumerate(row):
                own_or_prefix = key in (PREFIX, query) and key != PADDING
                assert bool(mask_B1TT[b, 0, i, j]) == (i == j or (j < i and own_or_prefix)), (b, i, j)
    behind_three = block_mask(rows.segments_BT, n_cached=3)
    assert behind_three[..., :3].all()
    assert torch.equal(behind_three[..., 3:], mask_B1TT)


def test_layout_of_a_small_row():
    """Written out by hand: 2 prefix tokens, a 2×2 grid, branches of 3 and 2 tokens whose last is only predicted."""
    rows = pack_rows([1, 2], [[Media(4, (2, 2))]], [[Branch((7, 8, 9), 1), Branch((5, 6), 1)]])
    assert rows.token_ids_BT.tolist() == [[1, 2, 0, 0, 0, 0, 7, 8, 5]]
    assert rows.segments_BT.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 2]]
    assert rows.positions_3BT[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5, 4],
        [0, 1, 2, 2, 3, 3, 4, 5, 4],
        [0, 1, 2, 3, 2, 3, 4, 5, 4],
    ]
    assert rows.media_BT[0].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert rows.predict_N2.tolist() == [[0, 6], [0, 7], [0, 8]]
    assert rows.targets_N.tolist() == [8, 9, 6]
    assert rows.counts == [[2, 1]]
    assert unpack("abc", rows.counts) == [[["a", "b"], ["c"]]]

    cached = pack_rows([1, 2], [[Media(4, (2, 2))]], [[Branch((7, 8, 9), 1), Branch((5, 6), 1)]], cache_prefix=True)
    assert cached.n_cached == 2
    assert torch.equal(cached.token_ids_BT, rows.token_ids_BT[:, 2:])
    assert torch.equal(cached.positions_3BT, rows.positions_3BT[:, :, 2:])
    assert cached.predict_N2.tolist() == [[0, 4], [0, 5], [0, 6]]


def test_layout_of_two_images():
    """By hand: one prefix token, a 2×2 grid, two tokens between, a 1×3 grid, a branch; beside a row without images."""
    branch = Branch((7, 8, 9), 1)
    rows = pack_rows([1], [[Media(4, (2, 2)), Media(3, (1, 3))], []], [[branch], [branch]], between_ids=[4, 5])
    assert rows.token_ids_BT[0].tolist() == [1, 0, 0, 0, 0, 4, 5, 0, 0, 0, 7, 8]
    assert rows.segments_BT.tolist() == [[0] * 10 + [1, 1], [0] + [-1] * 9 + [1, 1]]
    assert rows.media_BT[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert not rows.media_BT[1].any()
    assert rows.positions_3BT[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 8, 9],
        [0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 8, 9],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert rows.positions_3BT[0, 1, -2:].tolist() == [1, 2]


def test_a_grid_needs_a_square():
    with pytest.raises(ValueError, match="square number of latents, got 8"):
        latent_media(8, on_grid=True)
    with pytest.raises(ValueError, match="2 rows of images but 1 lists"):
        pack_rows([1], [[]] * 2, [[Branch((1, 2), 1)]])
