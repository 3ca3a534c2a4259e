"""Figures of geometry against closed forms and loops in plain Python; probes on features whose content is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from shared.errors import DataError
from trainer.evaluation import geometry
from trainer.evaluation.probe import linear_probes, probe_hits
from trainer.evaluation.statistics import ImageBootstrap


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))


def orthonormal_rows(n_rows: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(noise(width, n_rows)).Q.T


def test_slot_cosine_is_the_mean_over_pairs():
    latents_BKD = noise(3, 5, 4) + 0.5
    for b, value in enumerate(geometry.slot_cosine(latents_BKD).tolist()):
        pairs = [cosine(latents_BKD[b, k], latents_BKD[b, j]) for k, j in itertools.permutations(range(5), 2)]
        assert value == pytest.approx(sum(pairs) / len(pairs))
    assert geometry.slot_cosine(noise(1, 4).expand(2, 3, 4)).tolist() == pytest.approx([1, 1])
    assert geometry.slot_cosine(orthonormal_rows(4, 6)[None]).tolist() == pytest.approx([0], abs=1e-12)
    assert geometry.slot_cosine(noise(2, 1, 4)).isnan().all()


def test_between_image_cosine_is_the_mean_over_pairs_of_images():
    latents_BKD = noise(6, 3, 4) + 0.5
    values_BK = geometry.between_image_cosine(latents_BKD)
    for k in range(3):
        pairs = [cosine(latents_BKD[a, k], latents_BKD[b, k]) for a, b in itertools.combinations(range(6), 2)]
        assert float(values_BK[:, k].mean()) == pytest.approx(sum(pairs) / len(pairs))
    constant = noise(1, 3, 4).expand(6, 3, 4)
    torch.testing.assert_close(geometry.between_image_cosine(constant), torch.ones(6, 3, dtype=torch.float64))


def test_resampling_between_image_cosines_gives_the_spread_of_their_mean():
    """Many data sets of the same kind: the spread that one of them predicts is the spread among them."""
    n_images, n_sets = 60, 400
    values = [geometry.between_image_cosine(noise(n_images, 1, 3, seed=s) + 0.7)[:, 0] for s in range(n_sets)]
    spread = torch.stack([v.mean() for v in values]).std()
    predicted = torch.stack([v.std() for v in values]).mean() / math.sqrt(n_images)
    assert float(predicted / spread) == pytest.approx(1, abs=0.12)


def test_effective_rank():
    rotation = orthonormal_rows(6, 6)
    stretched = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0], dtype=torch.float64)) @ rotation[:4]
    examples_BKD = torch.stack([noise(1, 6).expand(4, 6), 7 * rotation[:4], stretched])
    p = [3 / 4.5, 1 / 4.5, 0.5 / 4.5]
    expected = [1.0, 4.0, math.exp(-sum(x * math.log(x) for x in p))]
    assert geometry.effective_rank(examples_BKD).tolist() == pytest.approx(expected)
    assert geometry.effective_rank(torch.zeros(1, 4, 6)).isnan().all()


def test_relative_norm():
    latents_BKD = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    visual_ND = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert geometry.relative_norm(latents_BKD, visual_ND).tolist() == [[2.5, 1.0]]


def test_visual_cosine():
    latents_BKD, pooled_BKD = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    values_BK = geometry.visual_cosine(latents_BKD, pooled_BKD)
    for b, k in itertools.product(range(2), range(3)):
        assert float(values_BK[b, k]) == pytest.approx(cosine(latents_BKD[b, k], pooled_BKD[b, k]))
    torch.testing.assert_close(geometry.visual_cosine(-2 * pooled_BKD, pooled_BKD), -torch.ones(2, 3).double())


def test_utility_and_helpful_slots():
    nll_zero_all_N = np.array([2.0, 1.0])
    assert geometry.utility(np.array([0.5, 1.5]), nll_zero_all_N).tolist() == [1.5, -0.5]
    gains = np.array([[0.2, -0.08], [0.0, 0.09], [0.1, 0.03], [-1.0, -1.0]])  # means .06, .045, .065, −1
    assert geometry.helpful_slots(nll_zero_all_N - gains, nll_zero_all_N) == 2


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Ratio of HSIC estimates with linear kernels, as Kornblith et al. define it."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ a.T @ centring @ b @ b.T @ centring)) / (n - 1) ** 2

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def test_linear_cka():
    x, y = noise(30, 5), noise(30, 8, seed=1) @ torch.diag(torch.linspace(0.1, 3, 8).double())
    y[:, :5] += x
    assert geometry.linear_cka(x, y) == pytest.approx(plain_cka(x.numpy(), y.numpy()))
    rotated = 3 * x @ orthonormal_rows(5, 5) + 100
    assert geometry.linear_cka(x, rotated) == pytest.approx(1)
    assert geometry.linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1]).double())) < 0.9
    assert math.isnan(geometry.linear_cka(x, noise(1, 7, seed=2).expand(30, 7)))
    assert geometry.linear_cka(noise(800, 5), noise(800, 5, seed=1)) < 0.02


def features(n_images: int, carries_answer: bool) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Two questions per image; a dimension that names the image, another that may give the answer."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(n_images), 2)
    answers = rng.integers(3, size=n_images)[images]
    noise_dims = rng.normal(size=(n_images, 4))[images]
    answer_dims = 3.0 * np.eye(3)[answers] + 0.3 * rng.normal(size=(len(images), 3))
    return (
        np.hstack([noise_dims, answer_dims if carries_answer else 0 * answer_dims]),
        [("red", "green", "blue")[a] for a in answers],
        images,
    )


def test_a_probe_finds_the_answer_if_it_is_there_and_nowhere_else():
    found, answers, images = features(100, carries_answer=True)
    assert probe_hits(found, answers, images, seed=0).mean() > 0.97
    absent, answers, images = features(100, carries_answer=False)
    assert probe_hits(absent, answers, images, seed=0).mean() < 0.45


def test_no_image_is_on_both_sides_of_a_fold():
    """One dimension per image: a probe that saw the image's other question would know the answer."""
    images = np.repeat(np.arange(60), 2)
    answers = np.array(["no", "yes"])[np.random.default_rng(1).integers(2, size=60)][images].tolist()
    assert probe_hits(np.eye(60)[images], answers, images, seed=0).mean() < 0.7


def test_probes_and_their_gap_are_paired():
    latents, answers, images = features(60, carries_answer=False)
    states, _, _ = features(60, carries_answer=True)
    bootstrap = ImageBootstrap(60, 200, 0)
    figures = linear_probes(bootstrap, latents, states, answers, images, seed=0)
    assert figures["gap"].value == pytest.approx(figures["answer_state"].value - figures["latents"].value)
    assert figures["gap"].low > 0.3
    assert figures["gap"].n == 120
    same = linear_probes(bootstrap, states, states, answers, images, seed=0)["gap"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_rare_answer_is_counted_and_too_few_answers_are_refused():
    found, answers, images = features(60, carries_answer=True)
    hits = probe_hits(found, ["mauve", *answers[1:]], images, seed=0)
    assert hits[0] == 0
    assert hits[2:].mean() > 0.95
    with pytest.raises(DataError, match="fewer than two answers"):
        probe_hits(found, ["red"] * len(answers), images, seed=0)
    with pytest.raises(DataError, match="fewer than two answers"):
        probe_hits(found[:8], answers[:8], images[:8], seed=0)
