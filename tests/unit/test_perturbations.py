"""What each perturbation of a picture keeps, by how much it changes the rest, and that seeds decide alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from shared.errors import DataError
from trainer.evaluation import perturbations as p


@pytest.fixture
def image() -> Image.Image:
    """Smooth colours of middle brightness with waves in them, wider than high."""
    rows, columns = np.mgrid[0:80, 0:120]
    waves = 15 * np.sin(rows / 3) * np.sin(columns / 4)
    channels = [60 + columns + waves, 180 - rows - waves, 90 + (rows + columns) / 4]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def test_every_perturbation_keeps_size_mode_and_its_input(image):
    before = image.tobytes()
    for name, perturb in p.perturbations([0, 1]).items():
        perturbed = perturb(image)
        assert (perturbed.size, perturbed.mode) == (image.size, "RGB"), name
        assert perturbed.tobytes() != before, name
        assert image.tobytes() == before, name


def test_seeds_decide_where_there_is_chance_and_only_there(image):
    first, again, other = (p.perturbations(seed) for seed in ([0, 1], [0, 1], [0, 2]))
    by_chance = []
    for name in first:
        assert first[name](image).tobytes() == again[name](image).tobytes()
        if first[name](image).tobytes() != other[name](image).tobytes():
            by_chance.append(name.rpartition("_")[0])
    assert set(by_chance) == {"shuffled", "occlusion", "noise"}
    assert len(by_chance) == 1 + 5 + 4


def test_blank_is_one_grey(image):
    assert p.blank(image).getcolors() == [(80 * 120, (128, 128, 128))]


def test_shuffled_pixels_keep_every_colour_and_hardly_any_place(image):
    shuffled = p.shuffle_pixels(image, 0)
    assert sorted(shuffled.get_flattened_data()) == sorted(image.get_flattened_data())
    same = (np.asarray(shuffled) == np.asarray(image)).all(axis=-1).mean()
    assert same < 0.01


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.5, 1.0])
def test_occlusion_covers_its_share_with_one_grey_rectangle(image, share):
    for seed in range(20):
        occluded = np.asarray(p.occlude(image, share, seed))
        covered = (occluded == 128).all(axis=-1)
        # Sides are rounded to pixels.
        assert covered.mean() == pytest.approx(share, abs=(80 + 120) / 2 / (80 * 120))
        rows, columns = covered.any(axis=1).sum(), covered.any(axis=0).sum()
        assert rows * columns == covered.sum()
        assert (occluded[~covered] == np.asarray(image)[~covered]).all()


def test_occlusion_reaches_all_sides_of_the_picture(image):
    covered = np.any([(np.asarray(p.occlude(image, 0.5, seed)) == 128).all(axis=-1) for seed in range(200)], axis=0)
    assert [side.any() for side in (covered[0], covered[-1], covered[:, 0], covered[:, -1])] == [True] * 4


def test_noise_has_the_stated_spread_and_no_bias(image):
    difference = np.asarray(p.add_noise(image, 10, 0)).astype(float) - np.asarray(image)
    assert difference.std() == pytest.approx(10, rel=0.02)
    assert abs(difference.mean()) < 0.3
    white = Image.new("RGB", (50, 50), (255, 255, 255))
    assert np.asarray(p.add_noise(white, 10, 0)).min() > 200, "clipped, not wrapped around"


def test_blur_keeps_the_mean_and_spreads_an_edge_by_its_radius():
    edge = np.zeros((40, 60, 3), dtype=np.uint8)
    edge[:, 30:] = 255
    spreads = []
    for radius in (2, 4):
        row = np.asarray(p.blur(Image.fromarray(edge), radius))[20, :, 0].astype(float)
        assert row.mean() == pytest.approx(127.5, abs=1)
        density = np.diff(row) / 255
        places = np.arange(59)
        mean = (places * density).sum()
        spreads.append(float(((places - mean) ** 2 * density).sum() ** 0.5))
    assert spreads == pytest.approx([2, 4], rel=0.15)


def test_jpeg_errs_more_the_lower_its_quality(image):
    original = np.asarray(image).astype(int)
    errors = [float(np.abs(np.asarray(p.compress(image, q)) - original).mean()) for q in (95, 50, 25, 10)]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 1.5
    assert errors[-1] > 3


def test_mismatched_images_have_another_answer():
    answers = ["red", "red", "blue", "red", ("2", "yes")]
    drawn = [p.mismatched(answers, seed) for seed in range(50)]
    assert all(answers[int(i)] != answers[b] for indices in drawn for b, i in enumerate(indices))
    assert {int(indices[0]) for indices in drawn} == {2, 4}, "any of them, not the first"
    assert (p.mismatched(answers, 7) == drawn[7]).all()
    with pytest.raises(DataError, match="every answer is 'red'"):
        p.mismatched(["red", "red"], 0)
