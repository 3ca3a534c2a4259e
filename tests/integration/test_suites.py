"""The suites of `evaluate` give the same numbers however they are read, and go on where they were interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shared.config import Config, NormCalibrationConfig, parse_config
from shared.messages import Question
from shared.reading import pack_questions, score_answers
from shared.run_folder import trained_generator
from shared.vlm import load_vlm
from tests.integration.helpers import training_tree
from trainer.data.clevr import load_clevr
from trainer.evaluation import run as evaluation_run
from trainer.evaluation.reading import Reader
from trainer.evaluation.run import evaluate_run
from trainer.image_features import ImageFeatures
from trainer.loop import train_run
from trainer.norm_calibration import NormCalibration

QUIET = Console(quiet=True)
SUITES = ("reading", "causal", "controls", "geometry")


def config_of(toy: Path, run_dir: Path, placement: str = "local", batch_images: int = 4) -> Config:
    tree = training_tree(
        toy,
        run_dir,
        placement,
        train={"steps": 2, "checkpoint_every": 2},
        evaluation={"images": 7, "batch_images": batch_images, "bootstrap_samples": 100},
    )
    return parse_config(tree, "test")


@pytest.fixture
def trained(toy_folder: Path, tmp_path: Path) -> Path:
    train_run(config_of(toy_folder, tmp_path / "run"), resume=False)
    return tmp_path / "run"


def assert_near(one: Any, other: Any, where: str = "") -> None:
    """Equal up to the rounding of another batch size: the same hits, NLLs near."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_near(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_near(a, b, f"{where}/{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4), where
    else:
        assert one == other, where


def test_batch_size_and_placement_do_not_change_a_number(clean_ray: None, toy_folder: Path, trained: Path) -> None:
    local = evaluate_run(config_of(toy_folder, trained), QUIET, SUITES)
    remote = evaluate_run(config_of(toy_folder, trained, "ray", batch_images=3), QUIET, SUITES)
    assert set(local) >= {"anchors", "gallery", "causal", "controls", "geometry"}
    assert local["gallery"], "random models must get something wrong"
    assert all(entry["answers"].keys() == {"A", "B"} for entry in local["gallery"])
    assert all(entry["answers"][name] != entry["gold"] for entry in local["gallery"] for name in entry["wrong"])
    assert_near(local, remote)
    assert json.loads((trained / "evaluation.json").read_text()) == json.loads(json.dumps(remote))


def test_no_reading_is_paid_twice(toy_folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[bytes] = []
    read = Reader._read

    def noting(self: Reader, latents_of_batch: Callable[[slice], Any], *args: Any, **kwargs: Any) -> Any:
        latents_BKD = latents_of_batch(slice(0, 7))
        readings.append(str(args).encode() if latents_BKD is None else latents_BKD.numpy().tobytes())
        return read(self, latents_of_batch, *args, **kwargs)

    monkeypatch.setattr(Reader, "_read", noting)
    result = evaluate_run(config_of(toy_folder, trained), QUIET, ("causal",))
    n_tests = len(result["causal"]["A"]["tests"])
    # The latents themselves come on top; images without any are the test `markers_only`, and the other swaps unread.
    assert len(readings) == len(set(readings)) == n_tests + 1
    readings.clear()
    evaluate_run(config_of(toy_folder, trained), QUIET, ("reading", "causal"))
    assert len(readings) == len(set(readings)) == n_tests + 1 + 3


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_starts_anew(
    toy_folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def noting(name: str, suite: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def measure(session: Any) -> Any:
            measured.append(name)
            return suite(session)

        return measure

    def interrupted(_session: Any) -> Any:
        raise KeyboardInterrupt

    suites = {name: noting(name, suite) for name, suite in evaluation_run.SUITES.items()}
    config = config_of(toy_folder, trained)
    monkeypatch.setattr(evaluation_run, "SUITES", {**suites, "causal": interrupted})
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(config, QUIET, ("reading", "causal"))
    assert not (trained / "evaluation.json").exists()
    monkeypatch.setattr(evaluation_run, "SUITES", suites)
    result = evaluate_run(config, QUIET, ("reading", "causal"))
    assert measured == ["reading", "causal"]
    assert set(result) >= {"anchors", "causal"}
    again = evaluate_run(config, QUIET, ("reading",))
    assert measured == ["reading", "causal", "reading"]
    assert again == result, "the causal section belongs to the same checkpoint and stays"
    other_seed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})
    assert "causal" not in evaluate_run(other_seed, QUIET, ("reading",))


def test_untrained_latents_are_inert(toy_folder: Path, trained: Path) -> None:
    result = evaluate_run(config_of(toy_folder, trained), QUIET, ("causal",))
    assert [figures["verdict"] for figures in result["causal"].values()] == ["inert", "inert"]


def test_a_run_is_like_itself_and_less_like_another(toy_folder: Path, trained: Path, tmp_path: Path) -> None:
    tree = config_of(toy_folder, tmp_path / "other").model_dump(mode="json")
    tree["train"] |= {"seed": 3, "steps": 4, "lr_lora": 0.05}
    train_run(parse_config(tree, "test"), resume=False)
    config = config_of(toy_folder, trained)
    alike = [
        evaluate_run(config, QUIET, ("reading",), other_run=run)["against"][str(run)]
        for run in (trained, tmp_path / "other")
    ]
    assert alike[0]["cka"] == pytest.approx(1.0)
    assert alike[0]["cka_per_slot"] == pytest.approx([1.0] * 9)
    assert alike[1]["cka"] < 0.999


def write_pope(folder: Path, images: list[Path]) -> None:
    (folder / "val2014").mkdir(parents=True)
    lines = []
    for i, image in enumerate(images):
        shutil.copy(image, folder / "val2014" / image.name)
        label = ("yes", "no")[i % 2]
        lines.append({"question_id": i, "image": image.name, "text": "is there a red square?", "label": label})
    for subset in ("random", "popular", "adversarial"):
        (folder / f"coco_pope_{subset}.json").write_text("\n".join(json.dumps(line) for line in lines))


def test_a_benchmark_is_answered_by_likelihood(toy_folder: Path, trained: Path, tmp_path: Path) -> None:
    """Against readings of one candidate at a time."""
    records = load_clevr(toy_folder / "data", "test")
    write_pope(tmp_path / "pope", [Path(str(record.images[0])) for record in records])
    tree = config_of(toy_folder, trained).model_dump(mode="json")
    tree["evaluation"]["benchmarks"] = {"pope": str(tmp_path / "pope")}
    config = parse_config(tree, "test")
    section = evaluate_run(config, QUIET, ("benchmarks",))["benchmarks"]["pope"]
    assert section["left_out"] == 0

    model = load_vlm(str(toy_folder / "B")).freeze()
    hits = []
    for i, record in enumerate(records):
        tokens = model.image_tokens(record.load_images())
        prompt = "is there a red square?\nAnswer yes or no."
        candidates = [[Question(prompt, answer)] for answer in ("yes", "no")]
        scored = [
            score_answers(model, pack_questions(model, tokens.media, [c]), torch.cat(tokens.tokens)).logprobs_N.sum()
            for c in candidates
        ]
        hits.append((scored[0] >= scored[1]) == (i % 2 == 0))
    figures = section["anchors"]["B"]["ceiling"]
    assert figures["n"] == 3 * len(records)
    assert figures["scores"]["accuracy"] == pytest.approx(sum(map(bool, hits)) / len(hits))
    assert figures["unparsed"] == []


def test_norm_calibration_is_a_switch_of_evaluation(toy_folder: Path, trained: Path) -> None:
    """Latents get the length of visual tokens; figures of the two ways to read them never stand in one file."""
    config = config_of(toy_folder, trained)
    evaluate_run(config, QUIET, ["reading"])
    plain = evaluate_run(config, QUIET, ["geometry"])
    assert {"anchors", "geometry"} <= plain.keys()
    switched = config.evaluation.model_copy(update={"norm_calibration": NormCalibrationConfig()})
    calibrated = evaluate_run(config.model_copy(update={"evaluation": switched}), QUIET, ["geometry"])
    assert "anchors" not in calibrated
    before, after = (result["geometry"]["norms"] for result in (plain, calibrated))
    assert after["image_tokens"] == before["image_tokens"]
    generator = trained_generator(config)
    records = load_clevr(config.data.path, "test")[:7]
    norms_B = NormCalibration(NormCalibrationConfig()).observe(ImageFeatures(generator, None).of_records(records))
    ends = torch.stack([norms_B.min(), norms_B.max()])
    torch.testing.assert_close(torch.tensor([min(after["latents"]), max(after["latents"])]), ends.float())
    assert after["latents"] != before["latents"]
    cosines = [result["geometry"]["slot_cosine"] for result in (plain, calibrated)]
    torch.testing.assert_close(torch.tensor(cosines[0]), torch.tensor(cosines[1]), rtol=0, atol=1e-5)
