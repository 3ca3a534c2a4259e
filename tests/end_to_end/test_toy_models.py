"""The tiny models that ship with the project load as hub models do and see what they claim to see."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.vlm import load_vlm
from trainer.data.clevr import load_clevr
from trainer.data.records import Record
from trainer.toy.build import PRETRAINING_QUESTIONS_PER_KIND, TOY_MODELS, accuracy, fit
from trainer.toy.dataset import ensure_toy_data
from trainer.toy.perception import perception_records
from trainer.toy.tiny_vlms import new_model, save_folder

MODELS = Path(__file__).parents[2] / "trainer/toy/models"
SHIPPED = sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir())
READERS_OF_SCENES = [spec.name for spec in TOY_MODELS if spec.sees == "scenes"]
N_SCENES = 500
OTHER_SEED = 4321
"""Neither the seed of the models' own images nor that of the demo's data set."""


@pytest.fixture(scope="session")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    root = tmp_path_factory.mktemp("unseen") / "data"
    ensure_toy_data(root, {"test": N_SCENES}, OTHER_SEED, PRETRAINING_QUESTIONS_PER_KIND)
    return load_clevr(root, "test")


@pytest.mark.parametrize("name", READERS_OF_SCENES)
def test_exact_match_on_unseen_scenes(name: str, unseen: list[Record]) -> None:
    model = load_vlm(str(MODELS / name)).freeze()
    with_image, without_image = accuracy(model, unseen), accuracy(model, unseen[:100], with_image=False)
    assert with_image["all"] >= 0.97, with_image
    assert without_image["all"] <= 0.5, without_image


def test_e_sees_several_images_at_once() -> None:
    model = load_vlm(str(MODELS / "E")).freeze()
    records = perception_records(150, OTHER_SEED)
    with_images, without_images = accuracy(model, records), accuracy(model, records, with_image=False)
    assert with_images["all"] >= 0.75, with_images
    assert without_images["all"] <= 0.3, without_images


def test_every_model_is_shipped() -> None:
    assert set(SHIPPED) == {spec.name for spec in TOY_MODELS}


def test_models_are_small_enough_to_ship() -> None:
    total = sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file())
    assert total <= 12 * 2**20


def test_siblings_are_different_models() -> None:
    weights = [(MODELS / name / "model.safetensors").read_bytes() for name in "ABC"]
    assert len(set(weights)) == len(weights)


def test_a_rebuild_learns_to_see(tmp_path: Path, unseen: list[Record]) -> None:
    """The first few hundred steps of A's recipe, from fresh weights."""
    ensure_toy_data(tmp_path / "data", {"train": 1500}, seed=1)
    spec = next(spec for spec in TOY_MODELS if spec.name == "A")
    save_folder(new_model(spec.family, spec.seed), tmp_path / "fresh")
    model = load_vlm(str(tmp_path / "fresh"))
    losses = fit(model, load_clevr(tmp_path / "data", "train"), replace(spec.stages[0], steps=250), spec.seed)
    with_image, without_image = (accuracy(model, unseen[:100], with_image=shown)["all"] for shown in (True, False))
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, exact match {with_image:.3f}, without image {without_image:.3f}")
    assert losses[-1] < 0.2 * losses[0]
    assert with_image > without_image + 0.1
