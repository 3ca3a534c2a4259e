"""The CLEVR reader on both kinds of real files and on damaged ones, and the sampler."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from shared.config import DataConfig
from shared.errors import DataError
from trainer.data import load_records, training_records
from trainer.data.clevr import load_clevr
from trainer.data.records import ImageFile, KindQuestion, Record
from trainer.data.sampling import Sampler

CLEVR_MINI = Path(__file__).parents[2] / "../shared/clevr-mini"

PROGRAMS = {
    "count": "count",
    "exist": "exist",
    "query_color": "query",
    "query_material": "query",
    "equal_integer": "compare_integer",
    "less_than": "compare_integer",
    "greater_than": "compare_integer",
    "equal_color": "compare_attribute",
    "equal_shape": "compare_attribute",
}


def write_clevr(root: Path, questions: list[dict], n_images: int = 2, split: str = "train") -> Path:
    for folder in ("questions", "scenes", f"images/{split}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in range(n_images):
        name = f"CLEVR_{split}_{index:06d}.png"
        Image.new("RGB", (8, 6), (index, 0, 0)).save(root / f"images/{split}/{name}")
        scenes.append({"image_index": index, "image_filename": name, "objects": []})
    (root / f"questions/CLEVR_{split}_questions.json").write_text(json.dumps({"info": {}, "questions": questions}))
    (root / f"scenes/CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))
    return root


def entry(index: int, question: str, answer: object, last: str = "count", key: str = "function") -> dict:
    return {
        "image_index": index,
        "image_filename": f"CLEVR_train_{index:06d}.png",
        "question": question,
        "answer": answer,
        "program": [{key: "scene", "inputs": []}, {key: last, "inputs": [0]}],
    }


def good_entries() -> list[dict]:
    return [entry(1, "How many?", "2"), entry(0, "Is there any?", "yes", "exist"), entry(0, "Colour?", "red")]


@pytest.mark.parametrize("key", ["function", "type"])
@pytest.mark.parametrize(("function", "kind"), PROGRAMS.items())
def test_kinds_of_the_published_and_the_generators_programs(tmp_path, key, function, kind):
    (record,) = load_clevr(write_clevr(tmp_path, [entry(0, "What?", "red", function, key)]), "train")
    assert [question.kind for question in record.questions] == [kind]


def test_published_and_generator_answers_read_alike(tmp_path):
    published = [entry(0, "A?", "yes"), entry(0, "B?", "no"), entry(1, "C?", "3"), entry(1, "D?", "0")]
    generated = [entry(0, "A?", True), entry(0, "B?", False), entry(1, "C?", 3), entry(1, "D?", 0)]
    one, two = (
        load_clevr(write_clevr(tmp_path / name, entries), "train")
        for name, entries in (("published", published), ("generated", generated))
    )
    assert [record.questions for record in one] == [record.questions for record in two]
    assert [q.answer for record in one for q in record.questions] == ["yes", "no", "3", "0"]


def test_records_are_ordered_by_image_and_load(tmp_path):
    records = load_clevr(write_clevr(tmp_path, good_entries()), "train")
    assert [record.record_id for record in records] == ["train/CLEVR_train_000000", "train/CLEVR_train_000001"]
    assert [len(record.questions) for record in records] == [2, 1]
    assert records[1].scene["image_index"] == 1
    assert records[1].load_images()[0].getpixel((0, 0)) == (1, 0, 0)
    assert records[0].questions[0].message.text == "Is there any?"


def image(root: Path, index: int) -> Path:
    return root / f"images/train/CLEVR_train_{index:06d}.png"


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def remove_image(root: Path) -> None:
    image(root, 1).unlink()


def corrupt_image(root: Path) -> None:
    image(root, 1).write_bytes(b"no image at all")


def empty_question(root: Path) -> None:
    change_json(root / "questions/CLEVR_train_questions.json", lambda c: c["questions"][0].update(question="  "))


def empty_answer(root: Path) -> None:
    change_json(root / "questions/CLEVR_train_questions.json", lambda c: c["questions"][0].update(answer=""))


def no_answer(root: Path) -> None:
    change_json(root / "questions/CLEVR_train_questions.json", lambda c: c["questions"][0].pop("answer"))


def no_scene(root: Path) -> None:
    change_json(root / "scenes/CLEVR_train_scenes.json", lambda c: c["scenes"].pop())


DAMAGES = {
    remove_image: r"CLEVR_train_000001\.png: image is missing; .*data\.on_error: skip",
    corrupt_image: r"CLEVR_train_000001\.png: not an image; .*data\.on_error: skip",
    empty_question: r"CLEVR_train_questions\.json: question 0: the question is empty; correct or drop",
    empty_answer: r"CLEVR_train_questions\.json: question 0: the answer is empty; correct or drop",
    no_answer: r"CLEVR_train_questions\.json: question 0: no answer; test-split files",
    no_scene: r"CLEVR_train_scenes\.json: no scene for CLEVR_train_000001\.png",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_record_is_named_or_skipped_and_counted(tmp_path, caplog, damage):
    write_clevr(tmp_path, good_entries())
    damage(tmp_path)
    with pytest.raises(DataError, match=DAMAGES[damage]):
        load_records(DataConfig(path=tmp_path), "train")
    with caplog.at_level(logging.WARNING):
        kept = load_records(DataConfig(path=tmp_path, on_error="skip"), "train")
    # Question 0 is the only one of image 1, so every damage costs exactly that image.
    assert [record.record_id for record in kept] == ["train/CLEVR_train_000000"]
    assert "1 damaged records skipped, 1 kept" in caplog.text
    assert "skipped: " in caplog.text


def test_numbers_and_scenes_that_are_there_twice_are_named_or_skipped(tmp_path):
    write_clevr(tmp_path, [{**question, "question_index": 7 + n // 2} for n, question in enumerate(good_entries())])
    with pytest.raises(DataError, match=r"questions\.json: question 1: question_index 7 is used twice; drop one"):
        load_records(DataConfig(path=tmp_path), "train")
    kept = load_records(DataConfig(path=tmp_path, on_error="skip"), "train")
    assert [q.text for record in kept for q in record.questions] == ["Colour?", "How many?"]
    write_clevr(tmp_path, good_entries())
    change_json(tmp_path / "scenes/CLEVR_train_scenes.json", lambda c: c["scenes"].append({**c["scenes"][0], "own": 1}))
    with pytest.raises(DataError, match=r"scene 2: a second scene for CLEVR_train_000000\.png; drop one of them"):
        load_records(DataConfig(path=tmp_path), "train")
    assert "own" not in load_records(DataConfig(path=tmp_path, on_error="skip"), "train")[0].scene


def test_an_image_cut_short_is_named_when_it_is_loaded(tmp_path):
    """Its header is whole, so only decoding can find out."""
    write_clevr(tmp_path, good_entries())
    noise = Image.effect_noise((64, 64), 50)
    noise.save(image(tmp_path, 1))
    image(tmp_path, 1).write_bytes(image(tmp_path, 1).read_bytes()[:1500])
    record = load_clevr(tmp_path, "train")[1]
    with pytest.raises(DataError, match=r"000001\.png: image of record train/CLEVR_train_000001 cannot be read"):
        record.load_images()


def test_files_that_are_no_json_or_absent(tmp_path):
    write_clevr(tmp_path, good_entries())
    with pytest.raises(
        DataError, match=r"CLEVR_val_questions\.json: cannot be read .*check data\.path and data\.split names"
    ):
        load_clevr(tmp_path, "val")
    questions = tmp_path / "questions/CLEVR_train_questions.json"
    for text in ("{", "[]", '{"scenes": []}', '{"questions": 3}', '{"questions": [{}, ', '{"questions": [{} {}]}'):
        questions.write_text(text)
        with pytest.raises(DataError, match=r"questions\.json: no valid JSON at byte \d+ \(.*copy the file again"):
            load_records(DataConfig(path=tmp_path, on_error="skip"), "train")
    questions.write_text('{"questions": [{"question": "' + "a" * 20_000_000)
    with pytest.raises(DataError, match=r"questions\.json: no valid JSON at byte 15 \(Unterminated string"):
        load_clevr(tmp_path, "train")
    questions.write_text('{"questions": []}')
    with pytest.raises(DataError, match="no usable record"):
        load_clevr(tmp_path, "train")


@pytest.mark.skipif(not CLEVR_MINI.is_dir(), reason="clevr-mini does not lie beside the repository")
def test_real_clevr():
    records = load_clevr(CLEVR_MINI, "val")
    assert len(records) == 200
    assert {len(record.questions) for record in records} == {10}
    questions = [question for record in records for question in record.questions]
    assert {q.kind for q in questions} == {"count", "exist", "query", "compare_integer", "compare_attribute"}
    assert {q.answer for q in questions if q.kind in ("exist", "compare_integer")} == {"yes", "no"}
    assert {q.answer for q in questions if q.kind == "count"} <= {str(n) for n in range(11)}
    assert all(record.scene["objects"] for record in records)
    assert records[7].load_images()[0].size == (160, 120)


def fake_records(n: int, n_questions: int = 5) -> list[Record]:
    return [
        Record(
            f"r{i}",
            "clevr",
            (ImageFile(Path(f"{i}.png")),),
            tuple(KindQuestion(("count", "exist")[q % 2], f"{i}.{q}?", "yes") for q in range(n_questions)),
        )
        for i in range(n)
    ]


def test_every_image_once_per_epoch_in_another_order_each_time():
    sampler = Sampler(fake_records(10), batch_images=4, questions_per_image=2, seed=3)
    seen = [record.record_id for step in range(10) for record in sampler.batch(step).records]
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_questions_are_drawn_without_replacement_one_of_each_kind_first():
    sampler = Sampler(fake_records(4), batch_images=4, questions_per_image=3, seed=0)
    counts: Counter[str] = Counter()
    for step in range(400):
        batch = sampler.batch(step)
        for record, asked in zip(batch.records, batch.questions, strict=True):
            assert len(set(asked)) == 3
            assert set(asked) <= set(record.questions)
            assert len({question.kind for question in asked[:2]}) == 2
            counts.update(question.text[1:] for question in asked)
    # Three questions on counts, two on existence; the third question is of the kind whose second comes first in a
    # random order of five: of 10 equally likely patterns, 7 have two counts before two of existence.
    count, exist = 1600 * (1 + 0.7) / 3, 1600 * (1 + 0.3) / 2
    expected = {".0?": count, ".1?": exist, ".2?": count, ".3?": exist, ".4?": count}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[text] - n) < 80 for text, n in expected.items())  # σ ≈ 20
    short = Sampler(fake_records(4, n_questions=2), batch_images=4, questions_per_image=3, seed=0)
    assert all(len(asked) == 2 for asked in short.batch(0).questions)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    def draw(seed: int, step: int):
        batch = Sampler(fake_records(10), 4, 2, seed).batch(step)
        return batch.records, batch.questions

    walked = Sampler(fake_records(10), 4, 2, 1)
    for step in (0, 1, 7, 3, 8):
        batch = walked.batch(step)
        assert (batch.records, batch.questions) == draw(1, step)
    assert draw(1, 0) != draw(2, 0)
    with pytest.raises(DataError, match=r"3 training images for train\.batch_images: 4"):
        Sampler(fake_records(3), 4, 2, 0)


def test_held_out_kinds(tmp_path):
    write_clevr(tmp_path, good_entries())
    (record,) = training_records(DataConfig(path=tmp_path, held_out_kinds=("exist",), max_images=2), seed=0)[:1]
    assert [q.text for q in record.questions] == ["Colour?"]
    with pytest.raises(DataError, match="holds out leaves no training question"):
        training_records(DataConfig(path=tmp_path, held_out_kinds=("exist", "count")), seed=0)
