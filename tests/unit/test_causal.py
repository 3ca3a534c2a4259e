"""What each swap keeps and what it loses, and verdicts on anchors whose use of the latents is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.errors import DataError
from trainer.evaluation import causal
from trainer.evaluation.causal import CausalTest, causal_tests
from trainer.evaluation.reading import Outcome
from trainer.evaluation.statistics import Figure, ImageBootstrap
from trainer.evaluation.verdict import VERDICT_TESTS, Usage, lost_share, paired_differences, verdict

B, K, D = 6, 4, 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latents_BKD() -> torch.Tensor:
    """Every vector has a length of its own."""
    return noise(B, K, D) * torch.arange(1, B * K + 1).view(B, K, 1)


def all_tests(n_latents: int = K, seed: int = 0) -> dict[str, CausalTest]:
    return causal_tests(n_latents, noise(50, D, seed=1), noise(B, n_latents, D, seed=2), seed)


def test_the_table_has_every_test_of_the_design():
    assert set(all_tests()) == {
        *("zero_all", "random_same_dist", "random_model_dist", "first_repeat", "permute_slots", "swap_images"),
        *("oracle", "removed", "markers_only", "noise_0.1", "noise_0.3", "noise_1", "truncate_1", "truncate_2"),
        *(f"{name}_{k}" for name in ("zero_slot", "keep_one") for k in range(K)),
    }
    assert [name for name in all_tests(9) if name.startswith("truncate")] == [f"truncate_{k}" for k in (1, 2, 4, 8)]
    assert set(all_tests()) >= set(VERDICT_TESTS)
    one_slot = all_tests(1)
    assert "permute_slots" not in one_slot
    assert not any(name.startswith("truncate") for name in one_slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_swap_keeps_dtype_images_width_and_its_input(latents_BKD, dtype):
    latents_BKD = latents_BKD.to(dtype)
    before = latents_BKD.clone()
    n_left = {"truncate_1": 1, "truncate_2": 2, "removed": 0, "markers_only": 0}
    for name, test in all_tests().items():
        swapped = test.swap(latents_BKD)
        assert swapped.dtype is dtype, name
        assert tuple(swapped.shape) == (B, n_left.get(name, K), D), name
        assert test.keeps_markers == (name != "removed")
        assert torch.equal(latents_BKD, before), name


def test_swaps_are_functions_of_their_seed(latents_BKD):
    changed = []
    for name, test in all_tests(seed=3).items():
        assert torch.equal(test.swap(latents_BKD), all_tests(seed=3)[name].swap(latents_BKD)), name
        if not torch.equal(test.swap(latents_BKD), all_tests(seed=4)[name].swap(latents_BKD)):
            changed.append(name)
    random = {"random_same_dist", "random_model_dist", "permute_slots", "swap_images"}
    assert set(changed) == random | {"noise_0.1", "noise_0.3", "noise_1"}


def test_zeroing_and_keeping_a_slot_split_the_latents(latents_BKD):
    for k in range(K):
        zeroed, kept = causal.zero_slot(latents_BKD, k), causal.keep_one(latents_BKD, k)
        assert torch.equal(zeroed + kept, latents_BKD)
        assert torch.equal(kept[:, k], latents_BKD[:, k])
        assert not zeroed[:, k].any()
    assert not causal.zero_all(latents_BKD).any()
    broken = torch.full((B, K, D), math.nan)
    assert not causal.zero_slot(broken, 1)[:, 1].any()


def test_random_same_dist_keeps_mean_and_scale_of_each_dimension():
    n_images = 2000
    scale_D, shift_D = torch.linspace(0.1, 5, D), torch.linspace(-3, 3, D)
    latents = noise(n_images, K, D) ** 3 * scale_D + shift_D
    drawn = causal.random_same_dist(latents, seed=0).flatten(0, 1)
    rows, error = latents.flatten(0, 1), 5 / math.sqrt(n_images * K)
    std_D = rows.std(dim=0)
    assert ((drawn.mean(dim=0) - rows.mean(dim=0)).abs() < error * std_D).all()
    assert ((drawn.std(dim=0) / std_D - 1).abs() < error).all()
    # The content is gone: rows of the same image correlate no more than chance.
    correlation = torch.corrcoef(torch.stack([((x - shift_D) / scale_D).flatten() for x in (drawn, rows)]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n_images * K * D)


def test_random_model_dist_keeps_mean_and_scale_of_the_visual_embeddings(latents_BKD):
    visual_ND = noise(400, D) * torch.linspace(0.1, 5, D) + 7
    drawn = causal.random_model_dist(latents_BKD.repeat(500, 1, 1), visual_ND, seed=0).flatten(0, 1)
    error = 5 / math.sqrt(len(drawn))
    std_D = visual_ND.std(dim=0, correction=0)
    assert ((drawn.mean(dim=0) - visual_ND.mean(dim=0)).abs() < error * std_D).all()
    assert ((drawn.std(dim=0) / std_D - 1).abs() < error).all()


def test_first_repeat_keeps_slot_0_of_each_image(latents_BKD):
    repeated = causal.first_repeat(latents_BKD)
    for k in range(K):
        assert torch.equal(repeated[:, k], latents_BKD[:, 0])


@pytest.mark.parametrize("seed", range(5))
def test_permute_slots_keeps_the_set_and_moves_every_slot_alike_for_all_images(latents_BKD, seed):
    permuted = causal.permute_slots(latents_BKD, seed)
    sources = [[int((latents_BKD[b] == row).all(-1).nonzero()) for row in permuted[b]] for b in range(B)]
    assert all(sorted(row) == list(range(K)) for row in sources)
    assert all(source != k for row in sources for k, source in enumerate(row))
    assert all(row == sources[0] for row in sources)


@pytest.mark.parametrize("seed", range(5))
def test_swap_images_keeps_whole_latents_and_gives_none_its_own(latents_BKD, seed):
    swapped = causal.swap_images(latents_BKD, seed)
    sources = [int((latents_BKD == row).all(-1).all(-1).nonzero()) for row in swapped]
    assert sorted(sources) == list(range(B))
    assert all(source != b for b, source in enumerate(sources))
    with pytest.raises(DataError, match="single image"):
        causal.swap_images(latents_BKD[:1], seed)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_noise_has_the_same_relative_strength_for_every_vector(sigma):
    lengths_BK1 = torch.logspace(-2, 2, 12).view(3, 4, 1)
    latents = noise(3, 4, 20_000) * lengths_BK1
    added = causal.add_noise(latents, sigma, seed=0) - latents
    ratio_BK = added.norm(dim=-1) / latents.norm(dim=-1)
    torch.testing.assert_close(ratio_BK, torch.full((3, 4), sigma), rtol=0.03, atol=0)
    assert ((added * latents).sum(-1) / added.norm(dim=-1) / latents.norm(dim=-1)).abs().max() < 0.04


def test_truncate_and_drop_all(latents_BKD):
    assert torch.equal(causal.truncate(latents_BKD, 3), latents_BKD[:, [0, 1, 2]])
    assert causal.drop_all(latents_BKD).shape == (B, 0, D)


def test_oracle_is_the_pooled_image(latents_BKD):
    pooled = noise(B, K, D, seed=5)
    assert torch.equal(causal.oracle(latents_BKD.bfloat16(), pooled), pooled.bfloat16())


def test_paired_differences_counted_by_hand():
    """Three questions about two images: one answer becomes wrong, one right, one stays."""
    plain = outcome_of(np.array([1.0, 0.0, 1.0]), np.array([0.5, 2.0, 1.0]))
    swapped = outcome_of(np.array([0.0, 1.0, 1.0]), np.array([1.5, 1.0, 4.0]))
    figures = paired_differences(ImageBootstrap(2, 200, 0), np.array([0, 0, 1]), plain, swapped)
    assert figures["accuracy"].value == pytest.approx(0)
    assert figures["nll"].value == pytest.approx(1.0)
    assert figures["flips"].value == pytest.approx(2 / 3)
    # Resamples of two images are (0, 0), (0, 1), (1, 1): the paired NLL difference is 0, 1 or 3.
    assert (figures["nll"].low, figures["nll"].high, figures["nll"].n) == (0.0, 3.0, 3)
    # Averaged over four draws of a swap, hits are shares and flips the expected number.
    averaged = outcome_of(np.array([0.25, 0.75, 1.0]), plain.nll_N)
    flips = paired_differences(ImageBootstrap(2, 200, 0), np.array([0, 0, 1]), plain, averaged)["flips"]
    assert flips.value == pytest.approx((0.75 + 0.75 + 0) / 3)


def outcome_of(hits_N: np.ndarray, nll_N: np.ndarray) -> Outcome:
    """Answers of one token, so that first token and answer are the same."""
    return Outcome(hits_N, nll_N, nll_N)


def anchor(accuracy: float, seed: int, n: int = 1500) -> Outcome:
    """An anchor that is right with this probability; 3 questions for each of 500 images."""
    hits = np.random.default_rng(seed).random(n) < accuracy
    return outcome_of(hits.astype(float), np.where(hits, 0.1, 3.0))


def usage(accuracies: dict[str, float], plain: float, floor: float) -> tuple[Usage, dict[str, Figure]]:
    bootstrap, images = ImageBootstrap(500, 500, 0), np.repeat(np.arange(500), 3)
    outcomes = {name: anchor(accuracy, seed) for seed, (name, accuracy) in enumerate(accuracies.items())}
    lost = {
        name: lost_share(bootstrap, images, anchor(plain, 100), outcome, anchor(floor, 101))
        for name, outcome in outcomes.items()
    }
    return verdict(lost), lost


def accuracies(swap_images: float, same_dist: float, model_dist: float) -> dict[str, float]:
    return {"swap_images": swap_images, "random_same_dist": same_dist, "random_model_dist": model_dist}


def test_lost_share():
    bootstrap, images = ImageBootstrap(2, 200, 0), np.array([0, 1])

    def share(plain: float, swapped: float, floor: float) -> float:
        outcomes = (outcome_of(np.full(2, accuracy), np.zeros(2)) for accuracy in (plain, swapped, floor))
        return lost_share(bootstrap, images, *outcomes).value

    assert share(0.9, 0.7, 0.4) == pytest.approx(0.2 / 0.5)
    assert share(0.9, 0.1, 0.4) == 1.0  # below the floor nothing more can be lost
    assert share(0.9, 0.95, 0.4) == pytest.approx(-0.1)
    assert share(0.4, 0.1, 0.4) == 0.0  # nothing was recovered
    assert share(0.3, 0.1, 0.4) == 0.0


def test_latents_that_carry_the_answer_are_used():
    found, lost = usage(accuracies(0.33, 0.30, 0.35), plain=0.95, floor=0.34)
    assert found is Usage.USED
    assert all(figure.low > 0.9 for figure in lost.values())


def test_latents_that_noise_can_replace_are_inert():
    assert usage(accuracies(0.70, 0.70, 0.69), plain=0.70, floor=0.34)[0] is Usage.INERT


def test_latents_that_recover_nothing_are_inert_even_if_noise_does_harm():
    """A run on shuffled pairs: no better than the floor, and noise confuses the anchor."""
    assert usage(accuracies(0.34, 0.20, 0.10), plain=0.345, floor=0.34)[0] is Usage.INERT


def test_constant_latents_are_inert_even_if_they_help():
    """They serve every image alike: swapping images costs exactly nothing, though noise costs all they gave."""
    bootstrap, images = ImageBootstrap(500, 500, 0), np.repeat(np.arange(500), 3)
    plain, floor = anchor(0.45, 1), anchor(0.34, 2)
    lost = {name: lost_share(bootstrap, images, plain, floor, floor) for name in VERDICT_TESTS}
    lost["swap_images"] = lost_share(bootstrap, images, plain, plain, floor)
    assert lost["random_same_dist"].low == 1.0
    assert verdict(lost) is Usage.INERT


@pytest.mark.parametrize(
    "swapped", [(0.75, 0.34, 0.34), (0.34, 0.80, 0.34), (0.34, 0.34, 0.80)], ids=["image", "same_dist", "model_dist"]
)
def test_latents_of_which_a_swap_leaves_most_are_partly_used(swapped):
    assert usage(accuracies(*swapped), plain=0.95, floor=0.34)[0] is Usage.PARTLY_USED
