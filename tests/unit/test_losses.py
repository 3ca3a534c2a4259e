"""Loss terms and schedules against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from shared.reading import mean_answer_weights, nll_per_image
from shared.vlm import ImageTokens, nearly_square, pooled_image_tokens
from trainer.losses import (
    ConceptHead,
    concept_loss,
    half_cosine,
    lr_share,
    nll_multi,
    norm_loss,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nll_multi():
    nll = [[1.0, 2.0, 6.0], [0.5, 0.5, 2.0]]
    weights = [2.0, 6.0]
    expected = sum(w * sum(row) / len(row) for w, row in zip(weights, nll, strict=True)) / sum(weights)
    assert nll_multi(torch.tensor(nll), torch.tensor(weights)).item() == pytest.approx(expected)


def test_concept_loss():
    predicted_BKD, target_BKD = noise(2, 3, 5), noise(2, 3, 5, seed=1)
    total = 0.0
    for b in range(2):
        for k in range(3):
            p, t = predicted_BKD[b, k].tolist(), target_BKD[b, k].tolist()
            dot = sum(x * y for x, y in zip(p, t, strict=True))
            total += 1 - dot / math.sqrt(sum(x * x for x in p) * sum(y * y for y in t))
    assert concept_loss(predicted_BKD, target_BKD).item() == pytest.approx(total / 6, rel=1e-5)
    assert concept_loss(target_BKD.bfloat16() * 7, target_BKD.bfloat16()).item() == pytest.approx(0, abs=1e-6)


def test_norm_loss():
    latents_BKD = noise(2, 3, 5)
    norms = [math.sqrt(sum(x * x for x in vector)) for row in latents_BKD.tolist() for vector in row]
    expected = sum((n - 1.7) ** 2 for n in norms) / len(norms) / 1.7**2
    assert norm_loss(latents_BKD, 1.7).item() == pytest.approx(expected, rel=1e-5)
    # Relative: the same figure for a model whose vectors are ten times as long.
    assert norm_loss(10 * latents_BKD, 17.0).item() == pytest.approx(expected, rel=1e-5)


def test_half_cosine():
    assert [half_cosine(s, 4, 1.0, 3.0) for s in (0, 2, 4, 5)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert half_cosine(1, 4, 1.0, 3.0) == pytest.approx(2 - math.cos(math.pi / 4))
    assert half_cosine(0, 0, 1.0, 3.0) == 3.0
    rising = [half_cosine(s, 50, 0.1, 1.0) for s in range(51)]
    assert rising == sorted(rising)


def test_lr_share():
    shares = [lr_share(s, n_steps=14, warmup_steps=4, final_share=0.1) for s in range(14)]
    assert shares[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert shares[9] == pytest.approx(0.55)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert 0.1 < shares[-1] < 0.13
    assert lr_share(0, 1, 0, 0.1) == 1.0
    assert lr_share(5, 5, 5, 0.3) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("n_latents", "cells"), [(1, (1, 1)), (4, (2, 2)), (6, (2, 3)), (9, (3, 3)), (7, (1, 7)), (12, (3, 4))]
)
def test_pooled_image_tokens(n_latents, cells):
    """Each cell averages the tokens whose row and column it overlaps, as adaptive pooling defines it."""
    grids = [(4, 6), (3, 3), (7, 5)]
    tokens = ImageTokens([noise(r * c, 2, seed=r) for r, c in grids], list(grids))
    pooled_BKD = pooled_image_tokens(tokens, nearly_square(n_latents))
    assert nearly_square(n_latents) == cells
    assert pooled_BKD.shape == (3, n_latents, 2)
    for b, (rows, columns) in enumerate(grids):
        for k in range(n_latents):
            i, j = divmod(k, cells[1])
            own_rows = range(i * rows // cells[0], -(-(i + 1) * rows // cells[0]))
            own_columns = range(j * columns // cells[1], -(-(j + 1) * columns // cells[1]))
            own = [tokens.tokens[b][r * columns + c] for r in own_rows for c in own_columns]
            torch.testing.assert_close(pooled_BKD[b, k], sum(own) / len(own))


def test_several_images_of_a_row_are_pooled_as_one_picture():
    """Two images, 2×2 and 4×4, side by side as a 2×4 picture; its halves are the images where columns allow."""
    tokens = ImageTokens([noise(4, 2), noise(16, 2, seed=1), noise(4, 2, seed=2)], [(2, 2), (4, 4), (2, 2)])
    pooled_BKD = pooled_image_tokens(tokens.in_rows([2, 1]), (2, 2))
    each = [
        pooled_image_tokens(ImageTokens([t], [g]), (2, 2))[0] for t, g in zip(tokens.tokens, tokens.grids, strict=True)
    ]
    rows = [[each[0][2 * r : 2 * r + 2].mean(0), each[1][2 * r : 2 * r + 2].mean(0)] for r in range(2)]
    torch.testing.assert_close(pooled_BKD[0], torch.stack([half for row in rows for half in row]))
    torch.testing.assert_close(pooled_BKD[1], each[2])


def test_a_norm_target_for_each_image():
    latents_BKD = noise(6, 4).reshape(2, 3, 4)
    targets = [1.5, 0.5]
    expected = [((h.norm() - t) / t) ** 2 for row, t in zip(latents_BKD, targets, strict=True) for h in row]
    torch.testing.assert_close(norm_loss(latents_BKD, torch.tensor(targets).unsqueeze(1)), torch.stack(expected).mean())


def test_pooling_without_a_grid():
    square = ImageTokens([noise(9, 2)], [None])
    torch.testing.assert_close(pooled_image_tokens(square, (3, 3))[0], square.tokens[0])
    line = ImageTokens([noise(6, 2)], [None])
    torch.testing.assert_close(
        pooled_image_tokens(line, (1, 3))[0], torch.stack([line.tokens[0][i : i + 2].mean(0) for i in (0, 2, 4)])
    )


def test_concept_head_computes_in_float32():
    head = ConceptHead(8)
    latents_BKD = noise(2, 3, 8).bfloat16()
    assert head(latents_BKD).dtype is torch.float32
    first, last = head.layers[0], head.layers[2]
    hidden = torch.nn.functional.gelu(latents_BKD.float() @ first.weight.T + first.bias)
    torch.testing.assert_close(head(latents_BKD), hidden @ last.weight.T + last.bias)
    assert first.weight.shape == (4, 8)


@pytest.mark.parametrize("count_end_of_turn", [True, False])
def test_token_weights_and_nll_per_image_are_the_same_mean(count_end_of_turn):
    logprobs = [[[-1.0, -2.0, -0.5], [-3.0, -0.1]], [[-0.2, -0.3, -0.4, -0.5]]]
    expected = []
    for row in logprobs:
        means = []
        for tokens in row:
            counted = tokens if count_end_of_turn else tokens[:-1]
            means.append(-sum(counted) / len(counted))
        expected.append(sum(means) / len(means))
    assert nll_per_image(logprobs, count_end_of_turn) == pytest.approx(expected)

    weights = iter(mean_answer_weights([[len(q) for q in row] for row in logprobs], count_end_of_turn))
    weighted = [-sum(next(weights) * value for q in row for value in q) for row in logprobs]
    assert weighted == pytest.approx(expected)
    assert next(weights, None) is None
