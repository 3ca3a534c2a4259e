"""A reader of another family gets as many tokens, in the same places, as for an image; known maps are recovered."""

from __future__ import annotations

import pytest
import torch

from shared.config import Config, parse_config
from shared.errors import ConfigError
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.evaluation.transfer import Regions, read_through_projectors

N_IMAGES = 6


@pytest.mark.parametrize(("n_latents", "n_tokens", "grid"), [(9, 36, (6, 6)), (6, 54, (6, 9)), (4, 4, (2, 2))])
def test_tokens_of_a_region_are_gathered_and_scattered_back(n_latents, n_tokens, grid):
    regions = Regions.of(n_latents, n_tokens)
    assert regions.grid == grid
    tokens_BCE = torch.randn(2, n_tokens, 5)
    gathered = regions.gather(tokens_BCE)
    assert gathered.shape == (2, n_latents, n_tokens // n_latents * 5)
    assert torch.equal(regions.scatter(gathered), tokens_BCE)
    side = regions.side
    for k in range(n_latents):
        row, column = divmod(k, regions.columns)
        own = [tokens_BCE[:, (row * side + i) * grid[1] + column * side + j] for i in range(side) for j in range(side)]
        assert torch.equal(gathered[:, k], torch.cat(own, dim=1))


def make_config(folder: str, latents: int, tokens: int) -> Config:
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": folder, "latents": latents},
        "anchors": [{"name": "A", "model": folder, "placement": "local"}],
        "data": {"path": "unused"},
        "evaluation": {
            "batch_images": 4,
            "bootstrap_samples": 100,
            "transfer": [{"name": "D", "model": folder, "placement": "local", "tokens": tokens}],
        },
    }
    return parse_config(tree, "test")


def test_latents_that_are_a_linear_image_of_the_readers_tokens_are_read_as_the_image(tiny_folder, tiny_model, tmp_path):
    """Vectors of another width that hold the reader's own tokens, mixed: the fit must undo the mixing."""
    from PIL import Image

    reader = tiny_model("llava")
    noise = torch.Generator().manual_seed(0)
    records = []
    for i in range(N_IMAGES * 40):
        pixels = torch.randint(0, 255, (48, 48, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
        shape = ("square", "circle", "triangle")[i % 3]
        questions = (KindQuestion("any", f"what color is the {shape}?", ("red", "blue")[i % 2]),)
        records.append(Record(str(i), "test", (ImageFile(tmp_path / f"{i}.png"),), questions))
    tokens = reader.image_tokens([image for record in records for image in record.load_images()])
    n_tokens = len(tokens.tokens[0])
    regions = Regions.of(n_tokens, n_tokens)
    own_BKF = regions.gather(torch.stack(tokens.tokens))
    mixing = torch.linalg.qr(torch.randn(own_BKF.shape[-1], own_BKF.shape[-1], generator=noise)).Q
    latents_BKD = own_BKF @ mixing

    config = make_config(tiny_folder("llava"), n_tokens, n_tokens)
    section = read_through_projectors(
        config,
        config.evaluation.transfer[0],
        records[:N_IMAGES],
        latents_BKD[:N_IMAGES],
        records[N_IMAGES:],
        {"mixed": latents_BKD[N_IMAGES:]},
    )
    for name in ("least_squares on mixed", "procrustes on mixed"):
        nll = section[name]["nll"]
        assert nll["latents"]["value"] == pytest.approx(nll["ceiling"]["value"], rel=1e-4)
        assert nll["swapped"]["value"] != pytest.approx(nll["ceiling"]["value"], rel=1e-4)
        assert section[name]["outside_span"] < 0.1


def test_tokens_that_do_not_tile_the_latents_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation.transfer: D has tokens 12, not generator.latents \(4\) times"):
        make_config("m", 4, 12)
