"""The demo's own config, shorter: train, evaluate and read the results as a user's script would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_service.pool import AnchorPool
from shared.config import load_config
from shared.vlm.generator import Generator
from trainer.checkpoint import CheckpointStore
from trainer.data import load_records
from trainer.evaluation.session import Session
from trainer.evaluation.suites import SUITES
from trainer.image_features import ImageFeatures

ROOT = Path(__file__).parents[2]


def run_verb(*arguments: str) -> str:
    """What a verb of the trainer prints; it must succeed."""
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    settings = [
        f"run.dir={folder / 'run'}",
        f"data.path={folder / 'data'}",
        "train.steps=250",
        "train.validate_every=0",
        "evaluation.images=100",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert "recovered" in run_verb("train", "--config", "deploy/configs/toy.yaml", *arguments)
    return folder / "run"


@pytest.fixture(scope="module")
def evaluation(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def suites(run: Path, evaluation: dict) -> dict:
    """Everything else that `evaluate` measures, with anchor A."""
    printed = run_verb("evaluate", str(run), "--suite", "all", "--anchors", "A")
    assert "latents are used" in printed
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.parametrize(("name", "bar"), [("A", 0.70), ("B", 0.70), ("C", 0.65)])
def test_latents_carry_the_answer_after_a_short_training(evaluation: dict, name: str, bar: float) -> None:
    """Bars are far under the full demo's; without training the share is about 0."""
    figures = evaluation["anchors"][name]
    assert figures["ceiling"]["value"] >= 0.97
    assert figures["recovered_share"]["value"] >= bar
    for figure in ("ceiling", "floor", "latents", "swapped", "recovered_share"):
        assert set(figures[figure]) == {"value", "low", "high", "n"}
        assert figures[figure]["low"] <= figures[figure]["value"] <= figures[figure]["high"]


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_latents_of_another_image_are_worth_no_more_than_none(evaluation: dict, name: str) -> None:
    figures = evaluation["anchors"][name]
    assert figures["swapped"]["value"] <= figures["floor"]["value"] + 0.05


def test_an_oracle_recovers_everything_and_noise_nothing(suites: dict) -> None:
    """A reads the generator's own visual tokens exactly as the image that they are."""
    tests = suites["causal"]["A"]["tests"]
    assert tests["oracle"]["recovered_share"]["value"] == pytest.approx(1.0, abs=0.002)
    for name in ("random_same_dist", "random_model_dist", "swap_images"):
        assert abs(tests[name]["recovered_share"]["value"]) <= 0.1


def test_the_verdict_is_used_and_disturbed_images_cost_more_the_more_they_are_disturbed(suites: dict) -> None:
    assert suites["causal"]["A"]["verdict"] == "used"
    controls = suites["controls"]["A"]
    assert controls["other_image"]["recovered_share"]["value"] <= 0.1
    accuracies = [controls[f"occlusion_{share}"]["accuracy"]["value"] for share in (10, 30, 50)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert controls["pgd"]["delta_nll"]["low"] > controls["noise_8"]["delta_nll"]["high"]


def test_another_family_reads_the_latents_through_a_projector(suites: dict) -> None:
    share = suites["transfer"]["D"]["least_squares on latents"]["recovered_share"]
    assert share["low"] >= 0.5


def test_constant_latents_are_caught_by_every_suite(run: Path, evaluation: dict) -> None:
    """The trained generator's mean latents for every image: the same norm, the same distribution over slots."""
    local = [f"anchors.{i}.placement=local" for i in range(2)]
    config = load_config(run / "config.yaml", [*local, "evaluation.images=60", "evaluation.unseen=[]"])
    records = load_records(config.data, config.data.test_split)[:60]
    generator = Generator(config.generator, config.train.seed)
    generator.load_adapter(CheckpointStore(run, 2).best().folder)
    with AnchorPool.start(config, generator.handshake()) as pool:
        features = ImageFeatures(generator, None)
        session = Session(config, generator, features, pool, records, lambda names, _what, _n: names)
        mean_1KD = session.latents_BKD.mean(dim=0, keepdim=True)
        session.latents_BKD = mean_1KD.expand_as(session.latents_BKD).clone()
        reading, causal, geometry = (SUITES[name](session) for name in ("reading", "causal", "geometry"))
    assert reading["A"]["recovered_share"]["value"] <= 0.1
    assert causal["A"]["verdict"] == "inert"
    assert geometry["figures"]["between_image_cosine"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert geometry["probes"]["latents"]["value"] <= geometry["probes"]["answer_state"]["value"]
