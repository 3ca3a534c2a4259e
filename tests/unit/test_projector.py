"""Projectors recover maps that are known, lose what their fit never saw, and say how much that is."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluation.projector import ReaderProjector, fit_least_squares, fit_procrustes, share_outside_span


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, m: int, seed: int = 0) -> torch.Tensor:
    """(n, m) with orthonormal rows (n ≤ m) or columns."""
    tall = torch.linalg.qr(noise(max(n, m), min(n, m), seed=seed)).Q
    return tall if n >= m else tall.T


def squared_error(projector: ReaderProjector, source_ND: torch.Tensor, target_NE: torch.Tensor) -> float:
    return float((projector(source_ND) - target_NE).square().sum())


@pytest.mark.parametrize(("d", "e"), [(6, 6), (6, 9), (6, 4)])
def test_least_squares_recovers_an_affine_map(d, e):
    source_ND, weight_DE, bias_E = noise(50, d), noise(d, e, seed=1), noise(e, seed=2)
    projector = fit_least_squares(source_ND, source_ND @ weight_DE + bias_E)
    torch.testing.assert_close(projector.weight_DE, weight_DE)
    torch.testing.assert_close(projector.bias_E, bias_E)
    latents_BKD = noise(2, 3, d, seed=3)
    torch.testing.assert_close(projector(latents_BKD), latents_BKD @ weight_DE + bias_E)


def test_least_squares_solves_the_normal_equations():
    """With noise in the targets: the solution of [X 1]ᵀ [X 1] [W; b] = [X 1]ᵀ Y."""
    source_ND, target_NE = noise(40, 5) + 2, noise(40, 3, seed=1)
    with_one = torch.cat([source_ND, torch.ones(40, 1).double()], dim=1)
    solution = torch.linalg.solve(with_one.T @ with_one, with_one.T @ target_NE)
    projector = fit_least_squares(source_ND, target_NE)
    torch.testing.assert_close(projector.weight_DE, solution[:-1])
    torch.testing.assert_close(projector.bias_E, solution[-1])


def test_least_squares_maps_directions_that_it_never_saw_to_nothing():
    """Fewer pairs than dimensions: exact on the pairs, blind across their span."""
    source_ND, target_NE = noise(4, 10), noise(4, 6, seed=1)
    projector = fit_least_squares(source_ND, target_NE)
    torch.testing.assert_close(projector(source_ND), target_NE)
    centred = source_ND - source_ND.mean(dim=0)
    unseen_D = noise(10, seed=2)
    unseen_D = unseen_D - torch.linalg.pinv(centred) @ centred @ unseen_D
    torch.testing.assert_close(projector(source_ND + unseen_D), target_NE)


@pytest.mark.parametrize(("d", "e"), [(6, 6), (6, 9), (6, 4)])
def test_procrustes_recovers_rotation_scale_and_shift(d, e):
    source_ND, rotation_DE = noise(50, d), rotation(d, e)
    if d > e:  # what the rotation drops must not vary for the recovery to be exact
        source_ND = source_ND @ rotation_DE @ rotation_DE.T
    target_NE = 2.5 * source_ND @ rotation_DE + noise(e, seed=2)
    projector = fit_procrustes(source_ND, target_NE)
    torch.testing.assert_close(projector(source_ND), target_NE)
    torch.testing.assert_close(projector.weight_DE, 2.5 * rotation_DE)


def test_procrustes_keeps_angles_and_relative_lengths_of_whatever_it_is_given():
    projector = fit_procrustes(noise(50, 6), noise(50, 8, seed=1))
    points = noise(20, 6, seed=2)
    distances, projected = torch.cdist(points, points), torch.cdist(projector(points), projector(points))
    off_diagonal = ~torch.eye(20, dtype=torch.bool)
    ratios = (projected / distances)[off_diagonal]
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios))


def test_no_other_rotation_scale_or_shift_fits_better_than_procrustes():
    source_ND, target_NE = noise(30, 4), noise(30, 4, seed=1) + 0.5 * noise(30, 4) @ rotation(4, 4, seed=3)
    best = fit_procrustes(source_ND, target_NE)
    error = squared_error(best, source_ND, target_NE)
    mean = source_ND.mean(dim=0)
    for seed in range(100):
        turn = torch.linalg.matrix_exp(0.1 * (noise(4, 4, seed=seed) - noise(4, 4, seed=seed).T))
        for factor in (0.9, 1.0, 1.1):
            weight = factor * best.weight_DE @ turn
            shifted = ReaderProjector(weight, best.bias_E + mean @ (best.weight_DE - weight))
            assert squared_error(shifted, source_ND, target_NE) > error
    assert squared_error(fit_least_squares(source_ND, target_NE), source_ND, target_NE) < error


def test_a_projector_keeps_the_latents_dtype_and_takes_any():
    projector = fit_least_squares(noise(20, 4).bfloat16(), noise(20, 6, seed=1).float())
    latents_BKD = noise(2, 3, 4).bfloat16()
    assert projector(latents_BKD).dtype is torch.bfloat16
    assert projector(latents_BKD).shape == (2, 3, 6)


def test_share_outside_the_span():
    source_ND = torch.zeros(100, 6).double()
    source_ND[:, :3] = noise(100, 3)
    source_ND += 5  # a common offset is no direction of the span
    inside = torch.zeros(50, 6).double()
    inside[:, :3] = noise(50, 3, seed=1)
    outside = torch.zeros(50, 6).double()
    outside[:, 3:] = noise(50, 3, seed=2)
    assert share_outside_span(inside + 100, source_ND) == pytest.approx(0, abs=1e-20)
    assert share_outside_span(outside, source_ND) == pytest.approx(1)
    mixed = inside + 2 * outside
    variance_inside, variance_all = mixed[:, :3].var(dim=0).sum(), mixed.var(dim=0).sum()
    assert share_outside_span(mixed, source_ND) == pytest.approx(float(1 - variance_inside / variance_all))


def test_the_span_may_be_asked_for_its_main_directions():
    """Variances 4, 1, .01: 75 % needs the first direction, 99 % two, everything three."""
    unit_ND = noise(500, 3) - noise(500, 3).mean(dim=0)
    white_ND = torch.linalg.qr(unit_ND).Q
    source_ND = white_ND * torch.tensor([2.0, 1.0, 0.1]).double()
    shares = [share_outside_span(white_ND, source_ND, held) for held in (0.75, 0.99, 1.0)]
    assert shares == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-12)
