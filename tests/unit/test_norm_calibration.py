"""Norm calibration: against a plain loop, and what it must never change."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.config import NormCalibrationConfig
from shared.errors import ConfigError
from shared.run_folder import run_config
from shared.vlm import ImageTokens
from tests.unit.test_generator import disturb, make_generator
from trainer.evaluation.reading import latents_of, latents_of_images
from trainer.image_features import ImageFeatures
from trainer.norm_calibration import NormCalibration, rescale, start_calibration


def tokens_of(per_row: list[int], seed: int = 0, width: int = 5) -> ImageTokens:
    """Images of 1 to 7 tokens and very different lengths, `per_row` of them in each row."""
    noise = torch.Generator().manual_seed(seed)
    n_images = sum(per_row)
    sizes = torch.randint(1, 8, (n_images,), generator=noise).tolist()
    images = [10.0**i * torch.randn(n, width, generator=noise) for i, n in enumerate(sizes)]
    return ImageTokens(images, [None] * n_images).in_rows(per_row)


def plain_references(tokens: ImageTokens, decay: float, statistic: str, warmup: int) -> list[float | None]:
    """The definition as a loop over lists of numbers."""
    references: list[float | None] = []
    seen: list[float] = []
    for row, images in enumerate(tokens.rows):
        norms = [sum(x * x for x in token) ** 0.5 for image in tokens.tokens[images] for token in image.tolist()]
        seen.append(statistics.mean(norms) if statistic == "mean" else statistics.median(norms))
        weights = [decay ** (row - i) for i in range(row + 1)]
        average = sum(weight * value for weight, value in zip(weights, seen, strict=True)) / sum(weights)
        references.append(average if row >= warmup else None)
    return references


@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 0), (0.5, 2), (0.0, 1), (0.99, 9)])
def test_against_a_plain_loop(statistic, decay, warmup):
    config = NormCalibrationConfig(decay=decay, statistic=statistic, warmup_records=warmup)
    tokens = tokens_of([1, 2, 1, 3])
    latents_BKD = torch.randn(4, 3, 5)
    calibrated_BKD = NormCalibration(config)(latents_BKD, tokens)
    for b, reference in enumerate(plain_references(tokens, decay, statistic, warmup)):
        for k in range(3):
            latent = latents_BKD[b, k].tolist()
            length = sum(x * x for x in latent) ** 0.5
            expected = latent if reference is None else [x * reference / length for x in latent]
            torch.testing.assert_close(calibrated_BKD[b, k], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=4),
    target_exponent=st.integers(-15, 15),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_the_direction_never_changes_and_the_length_is_the_target(exponents, target_exponent, dtype, seed):
    """Latents from 1e-30 to 1e30 long, targets from 1e-15 to 1e15: within the rounding of the dtype."""
    noise = torch.Generator().manual_seed(seed)
    lengths_K = torch.tensor([10.0**e for e in exponents], dtype=torch.float64)
    latents_1KD = (torch.randn(len(exponents), 6, generator=noise, dtype=torch.float64) * lengths_K[:, None])[None]
    latents_1KD = latents_1KD.to(dtype)
    target = 10.0**target_exponent
    after_1KD = rescale(latents_1KD, torch.tensor([target]))
    assert after_1KD.dtype is dtype
    rounding = 4 * torch.finfo(dtype).eps
    before, after = latents_1KD.double(), after_1KD.double()
    torch.testing.assert_close(
        after.norm(dim=-1), torch.full((1, len(exponents)), target).double(), rtol=rounding, atol=0
    )
    units_before, units_after = (x / x.norm(dim=-1, keepdim=True) for x in (before, after))
    assert (units_before - units_after).abs().max() <= rounding


def test_the_first_record_weighs_no_more_than_its_share():
    """Ten records of norm 1 after one of norm 100: near their mean, which a start at the first would miss by far."""
    images = [torch.tensor([[100.0, 0.0]])] + [torch.tensor([[1.0, 0.0]])] * 10
    norms_B = NormCalibration(NormCalibrationConfig(decay=0.999)).observe(ImageTokens(images, [None] * 11))
    assert float(norms_B[-1]) == pytest.approx((100 + 10) / 11, rel=0.01)


def test_zero_latents_and_rows_that_warm_up_stay_as_they_are():
    latents_BKD = torch.randn(3, 2, 4)
    latents_BKD[0, 1] = 0
    after_BKD = rescale(latents_BKD, torch.tensor([2.0, torch.nan, 0.5]))
    assert torch.equal(after_BKD[0, 1], torch.zeros(4))
    assert torch.equal(after_BKD[1], latents_BKD[1])
    assert after_BKD[0, 0].norm() == pytest.approx(2.0)
    assert rescale(latents_BKD, None) is latents_BKD
    assert start_calibration(None) is None


def test_gradients_are_those_of_the_formula():
    latents_BKD = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    norms_B = torch.tensor([3.0, torch.nan], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda latents: rescale(latents, norms_B), (latents_BKD,))
    zero_BKD = torch.zeros(2, 2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rescale(zero_BKD, norms_B).sum(), zero_BKD)
    assert torch.isfinite(gradient).all()


def test_how_records_are_cut_into_batches_changes_nothing():
    config, latents_BKD = NormCalibrationConfig(decay=0.8), torch.randn(5, 2, 5)
    whole = tokens_of([1, 2, 1, 1, 2])
    expected_BKD = NormCalibration(config)(latents_BKD, whole)
    calibration, parts, start = NormCalibration(config), [], 0
    for images, n_rows in ((3, 2), (1, 1), (3, 2)):
        first = sum(len(part[1].tokens) for part in parts)
        tokens = ImageTokens(whole.tokens[first : first + images], [None] * images)
        per_row = whole.per_row[start : start + n_rows]
        parts.append((latents_BKD[start : start + n_rows], tokens.in_rows(per_row)))
        start += n_rows
    assert torch.equal(torch.cat([calibration(latents, tokens) for latents, tokens in parts]), expected_BKD)
    assert calibration.n_records == 5


def test_latents_of_a_generator(tiny_folder, picture_records):
    """The switch reaches both ways in which evaluation makes latents, whatever the batch size."""
    generator = make_generator(tiny_folder("qwen2_5_vl"))
    disturb(generator)
    features = ImageFeatures(generator, None)
    config = NormCalibrationConfig(decay=0.5)
    plain_BKD = latents_of(generator, features, picture_records, 2)
    references = plain_references(features.of_records(picture_records), 0.5, "mean", 0)
    expected_BK = torch.tensor(references)[:, None].expand(3, plain_BKD.shape[1])
    rows = [record.load_images() for record in picture_records]
    for batch_images in (1, 3):
        for calibrated_BKD in (
            latents_of(generator, features, picture_records, batch_images, NormCalibration(config)),
            latents_of_images(generator, rows, batch_images, NormCalibration(config)),
        ):
            torch.testing.assert_close(calibrated_BKD.norm(dim=-1), expected_BK, rtol=1e-4, atol=0)
            cosines_BK: Tensor = torch.cosine_similarity(calibrated_BKD, plain_BKD, dim=-1)
            torch.testing.assert_close(cosines_BK, torch.ones_like(cosines_BK), rtol=0, atol=1e-5)


def test_the_switch_in_a_config(tmp_path):
    text = "{run: {dir: x}, generator: {model: m}, data: {path: p}, evaluation: {images: 2}}"
    (tmp_path / "config.yaml").write_text(text)
    assert run_config(tmp_path).evaluation.norm_calibration is None
    switched = run_config(tmp_path, ["evaluation.norm_calibration={}"])
    assert switched.evaluation.norm_calibration == NormCalibrationConfig()
    with pytest.raises(ConfigError, match=r"evaluation.norm_calibration.decay"):
        run_config(tmp_path, ["evaluation.norm_calibration={decay: 1.0}"])
