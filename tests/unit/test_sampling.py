"""Mixtures whose order needs no state, pairs that never match, and what is held out: nothing of it leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.config import DataConfig
from shared.errors import ConfigError, DataError
from trainer.data import HELD_OUT_QUESTIONS, load_records, other_parts, training_records
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.data.sampling import Part, Sampler, derangement, image_digests, shares_of_block
from trainer.toy.dataset import ensure_toy_data


def fake_records(name: str, n: int) -> list[Record]:
    questions = [tuple(KindQuestion("count", f"{name}{i}.{q}?", "yes") for q in range(3)) for i in range(n)]
    return [Record(f"{name}{i}", name, (ImageFile(Path(f"{i}.png")),), questions[i]) for i in range(n)]


def write_jsonl(root: Path, split: str, colours: list[int], n_questions: int = 3) -> None:
    """One record per colour, each with an image file of its own; equal colours make equal files."""
    root.mkdir(exist_ok=True)
    lines = []
    for place, colour in enumerate(colours):
        file = f"{split}-{place}.png"
        Image.new("RGB", (4, 4), (colour, 0, 0)).save(root / file)
        asked = [{"question": f"{split}{place}.{q}?", "answer": "yes", "kind": "exist"} for q in range(n_questions)]
        lines.append(json.dumps({"id": f"{split}{place}", "image": file, "questions": asked}) + "\n")
    (root / f"{split}.jsonl").write_text("".join(lines))


def hashes(records: list[Record]) -> set[str]:
    return {hashlib.sha256(data).hexdigest() for record in records for data in record.image_bytes()}


def mixture(seed: int = 0) -> Sampler:
    others = [Part(fake_records("b", 7), 0.5), Part(fake_records("c", 30), 0.25)]
    return Sampler(fake_records("a", 40), 8, 2, seed, others=others)


def test_a_mixture_keeps_its_weights_in_every_thousand_images() -> None:
    assert shares_of_block([1.0, 0.5, 0.25]) == [571, 286, 143]  # 571.43, 285.71, 142.86
    sampler = mixture()
    drawn = [record for step in range(250) for record in sampler.batch(step).records]
    for start in (0, 1000):
        assert Counter(r.source for r in drawn[start : start + 1000]) == {"a": 571, "b": 286, "c": 143}
    sources = "".join(record.source for record in drawn)
    assert sources[:1000] != sources[1000:]
    for name, n in (("a", 40), ("b", 7), ("c", 30)):
        own = [record.record_id for record in drawn if record.source == name]
        assert all(len(set(own[start : start + n])) == n for start in range(0, len(own) - n, n)), "an epoch repeats"
    alone = Sampler(fake_records("a", 40), 8, 2, 0)
    expected = [record.record_id for step in range(100) for record in alone.batch(step).records]
    assert [record.record_id for record in drawn if record.source == "a"][:800] == expected
    with pytest.raises(DataError, match=r"data\.others: a weight is below 1/1000"):
        shares_of_block([1.0, 0.0001])


def test_any_step_first_and_any_number_of_workers_give_the_same_batches() -> None:
    in_order = [mixture().batch(step) for step in range(150)]
    shared = mixture()
    with ThreadPoolExecutor(4) as workers:
        together = list(workers.map(shared.batch, range(150)))
    assert together == in_order
    assert mixture().batch(149) == in_order[149]
    assert mixture(seed=1).batch(0) != in_order[0]


@pytest.mark.parametrize("groups", [[0, 1], [0, 0, 1, 1], [0, 1, 2, 2, 2, 3], [0] * 5 + [1] * 5, [0, 0, 1, 2, 3, 3]])
def test_no_image_goes_to_the_place_of_an_equal_one(groups: list[int]) -> None:
    for seed in range(20):
        target = derangement(len(groups), seed, groups)
        assert sorted(target) == list(range(len(groups)))
        assert all(groups[i] != groups[target[i]] for i in range(len(groups)))
    with pytest.raises(DataError, match="3 of 5 images are the same one"):
        derangement(5, 0, [0, 0, 0, 1, 2])


@pytest.mark.parametrize("n", [2, 3, 17])
def test_without_repeats_pairs_are_one_cycle(n: int) -> None:
    for seed in range(5):
        target = derangement(n, seed)
        assert np.array_equal(target, derangement(n, seed, list(range(n))))
        walked, place = set(), 0
        while place not in walked:
            walked.add(place)
            place = int(target[place])
        assert len(walked) == n


def test_shuffled_pairs_of_a_split_with_repeated_images(tmp_path: Path) -> None:
    colours = [1, 1, 1, 2, 3, 4, 4, 5]
    write_jsonl(tmp_path, "train", colours)
    config = DataConfig(source="jsonl", path=tmp_path, pairing="shuffled")
    matched = list(load_records(config, "train"))
    image_of = {record.questions: digest for record, digest in zip(matched, image_digests(matched), strict=True)}
    for seed in range(5):
        shuffled = list(training_records(config, seed))
        assert [record.images for record in shuffled] == [record.images for record in matched]
        assert {record.questions for record in shuffled} == set(image_of)
        for record, digest in zip(shuffled, image_digests(shuffled), strict=True):
            assert image_of[record.questions] != digest, "an image was asked its own question"


def test_a_held_out_question_of_every_image(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "train", list(range(12)))
    config = DataConfig(source="jsonl", path=tmp_path, hold_out_question=True)
    everything = {q for record in load_records(config, "train") for q in record.questions}
    trained = list(training_records(config, 0))
    held = list(load_records(config, "train" + HELD_OUT_QUESTIONS))
    assert [len(record.questions) for record in trained] == [2] * 12
    assert [len(record.questions) for record in held] == [1] * 12
    kept_back = {q for record in held for q in record.questions}
    assert kept_back.isdisjoint(q for record in trained for q in record.questions)
    assert kept_back | {q for record in trained for q in record.questions} == everything
    assert len({q.text[-2] for q in kept_back}) > 1, "always the same place"
    assert list(load_records(config, "train" + HELD_OUT_QUESTIONS)) == held
    with pytest.raises(ConfigError, match=r"set data\.hold_out_question: true"):
        load_records(config.model_copy(update={"hold_out_question": False}), "train" + HELD_OUT_QUESTIONS)
    shuffled = training_records(config.model_copy(update={"pairing": "shuffled"}), 0)
    assert kept_back.isdisjoint(q for record in shuffled for q in record.questions)


def test_a_held_out_question_is_not_asked_of_the_same_image_elsewhere(tmp_path: Path) -> None:
    """Equal images in two records, and a question that one record has twice."""
    tmp_path.mkdir(exist_ok=True)
    lines = []
    for n in range(24):
        Image.new("RGB", (4, 4), (n // 2, 0, 0)).save(tmp_path / f"{n}.png")
        texts = ["how many?", "any red?", "any blue?", "any red?"] if n % 3 else ["how many?", "any red?", "any blue?"]
        asked = [{"question": text, "answer": "yes"} for text in texts]
        lines.append(json.dumps({"image": f"{n}.png", "questions": asked}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = DataConfig(source="jsonl", path=tmp_path, hold_out_question=True)

    def pairs(records: Sequence[Record]) -> set[tuple[str, str]]:
        digests = [hashlib.sha256(record.image_bytes()[0]).hexdigest() for record in records]
        return {(digest, q.text) for record, digest in zip(records, digests, strict=True) for q in record.questions}

    everything, trained = pairs(load_records(config, "train")), pairs(training_records(config, 0))
    held = pairs(load_records(config, "train" + HELD_OUT_QUESTIONS))
    assert trained
    assert trained == everything - held


def test_images_of_one_question_hold_none_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "train", [1, 2], n_questions=1)
    config = DataConfig(source="jsonl", path=tmp_path, hold_out_question=True)
    assert len(training_records(config, 0)) == 2
    assert len(load_records(config, "train" + HELD_OUT_QUESTIONS)) == 0


def test_training_images_that_are_held_out_too_are_dropped(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "train", [1, 2, 3, 4, 5])
    write_jsonl(tmp_path, "val", [2, 9])
    write_jsonl(tmp_path, "test", [4])
    config = DataConfig(source="jsonl", path=tmp_path)
    held = hashes([*load_records(config, "val"), *load_records(config, "test")])
    assert len(hashes(list(training_records(config, 0))) & held) == 2
    clean = list(training_records(config.model_copy(update={"drop_shared_images": True}), 0))
    assert [record.record_id for record in clean] == ["train/train0", "train/train2", "train/train4"]
    assert hashes(clean).isdisjoint(held)
    write_jsonl(tmp_path / "two", "train", [4, 6])
    other = {"source": "jsonl", "path": tmp_path / "two"}
    (part,) = other_parts(DataConfig(source="jsonl", path=tmp_path, drop_shared_images=True, others=[other]), 0)
    assert [record.record_id for record in part.records] == ["train/train1"], "in the main source's test split"


def test_the_toy_splits_share_no_image(tmp_path: Path) -> None:
    ensure_toy_data(tmp_path / "toy", {"train": 40, "val": 20, "test": 20}, seed=3)
    config = DataConfig(path=tmp_path / "toy")
    train, val, test = (hashes(list(load_records(config, split))) for split in ("train", "val", "test"))
    assert (len(train & val), len(train & test), len(val & test)) == (0, 0, 0)


def test_a_mixture_of_a_config(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one", "train", list(range(8)))
    write_jsonl(tmp_path / "two", "fit", [50, 51])
    other = {"source": "jsonl", "path": tmp_path / "two", "train_split": "fit", "weight": 0.25}
    config = DataConfig(source="jsonl", path=tmp_path / "one", others=[other])
    (part,) = other_parts(config, 0)
    assert (part.weight, [record.record_id for record in part.records]) == (0.25, ["fit/fit0", "fit/fit1"])
    sampler = Sampler(training_records(config, 0), 10, 2, 0, others=[part])
    drawn = Counter(record.record_id[:3] for step in range(100) for record in sampler.batch(step).records)
    assert drawn == {"tra": 800, "fit": 200}
