"""The generic format, good and damaged; views of records against plain lists."""

from __future__ import annotations

import json
import logging
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.config import DataConfig
from shared.errors import DataError
from trainer.data import load_records
from trainer.data.jsonl import load_jsonl
from trainer.data.records import KindQuestion
from trainer.data.spans import MAX_OBJECT_BYTES


def write_jsonl(root: Path, records: list[dict[str, Any] | bytes], split: str = "train") -> Path:
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    for n in range(4):
        Image.new("RGB", (8, 6), (n, 0, 0)).save(root / f"pictures/{n}.png")
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    (root / f"{split}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return root


def good(**more: Any) -> dict[str, Any]:
    return {"id": "good", "image": "pictures/0.png", "question": "how many?", "answer": 2, "kind": "count", **more}


def test_a_record_of_every_form(tmp_path: Path) -> None:
    several = {
        "id": 7,
        "images": ["pictures/1.png", "pictures/2.png"],
        "questions": [
            {"question": " which is brighter? ", "answer": "the second", "kind": "compare"},
            {"question": "are they alike?", "answer": False},
            {"question": "how far apart?", "answer": 2.0},
            {"question": "Größe?", "answer": 0.25},
        ],
        "scene": {"objects": []},
        "licence": "ignored",
    }
    plain = {"image": "pictures/0.png", "question": "what?", "answer": "ja"}
    first, second, third = load_jsonl(write_jsonl(tmp_path, [several, b"", plain, good()]), "train")
    assert [record.record_id for record in (first, second, third)] == ["train/7", "train/3", "train/good"]
    assert first.questions == (
        KindQuestion("compare", "which is brighter?", "the second"),
        KindQuestion("unknown", "are they alike?", "no"),
        KindQuestion("unknown", "how far apart?", "2"),
        KindQuestion("unknown", "Größe?", "0.25"),
    )
    assert [image.getpixel((0, 0))[0] for image in first.load_images()] == [1, 2]
    assert first.scene == {"objects": []}
    assert third.questions == (KindQuestion("count", "how many?", "2"),)


def test_an_auxiliary_image_is_no_image_of_the_record(tmp_path: Path) -> None:
    line = good(auxiliary={"image": "pictures/3.png", "description": " two red cups "})
    record, without = load_jsonl(write_jsonl(tmp_path, [line, good(id="plain")]), "train")
    assert len(record.load_images()) == 1
    assert record.auxiliary is not None
    assert record.auxiliary.description == "two red cups"
    assert record.auxiliary.image.read() == (tmp_path / "pictures/3.png").read_bytes()
    assert without.auxiliary is None


DAMAGED: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b'{"id": ', r"train\.jsonl: line 2: no valid JSON"),
    "a list": (b"[]", r"line 2: not a JSON object"),
    "deep": (b'{"id": ' + b"[" * 100_000, r"line 2: no valid JSON"),
    "invalid UTF-8": (b'{"id": "\xff"}', r"line 2: no valid JSON \('utf-8' codec"),
    "half a surrogate pair": (good(id="x", question="\ud800"), r"line 2: the question is no valid Unicode"),
    "NaN": (good(id="x", answer=float("nan")), r"line 2: the answer is nan"),
    "null answer": (good(id="x", answer=None), r"line 2: no answer"),
    "empty answer": (good(id="x", answer=" "), r"line 2: the answer is empty"),
    "list as answer": (good(id="x", answer=["2"]), r"line 2: answer is no text"),
    "no question": ({"id": "x", "image": "pictures/1.png", "answer": "2"}, r"line 2: no question"),
    "empty list of questions": ({"id": "x", "image": "pictures/1.png", "questions": []}, r"questions is no list of 1"),
    "wrong question": (
        {"id": "x", "image": "pictures/1.png", "questions": [{"question": "a?", "answer": "b"}, 3]},
        r"line 2, question 1: not a JSON object",
    ),
    "both forms of questions": (good(id="x", questions=[]), r"both questions and a single question"),
    "both forms of images": (good(id="x", images=["pictures/1.png"]), r"give either image or images"),
    "no image": ({"id": "x", "images": [], "question": "a?", "answer": "b"}, r"images is no list of 1 to 64 paths"),
    "duplicate id": (good(), r"line 2: id 'train/good' is used twice"),
    "long text": (good(id="x", question="a" * 20_001), r"question has 20001 characters"),
    "scene": (good(id="x", scene="dark"), r"line 2: scene is no object"),
    "auxiliary": (good(id="x", auxiliary="pictures/1.png"), r"line 2: auxiliary is no object with image and desc"),
    "auxiliary without words": (
        good(id="x", auxiliary={"image": "pictures/1.png"}),
        r"line 2, auxiliary: description is no text",
    ),
    "missing auxiliary image": (
        good(id="x", auxiliary={"image": "pictures/9.png", "description": "a cup"}),
        r"pictures/9\.png: image is missing; restore the file that .*line 2, auxiliary names",
    ),
    "auxiliary image elsewhere": (
        good(id="x", auxiliary={"image": "../a.png", "description": "a cup"}),
        r"line 2, auxiliary: image .* leads out of",
    ),
    "missing image": (
        good(id="x", image="pictures/9.png"),
        r"pictures/9\.png: image is missing; restore the file that .*line 2 names",
    ),
    "letter case": (good(id="x", image="pictures/1.PNG"), r"missing, but 1\.png is there: names must agree in letter"),
    "empty file": (good(id="x", image="empty.png"), r"empty\.png: not an image"),
    "absolute path": (good(id="x", image="/etc/hostname"), r"'/etc/hostname' leads out of"),
    "path traversal": (good(id="x", image="pictures/../../a.png"), r"line 2: image .* leads out of"),
    "zero byte": (good(id="x", image="pictures/1.png\0"), r"line 2: image .* leads out of"),
    "a link out": (good(id="x", image="out.png"), r"line 2: image 'out\.png' is a link out of"),
    "a folder that leads out": (good(id="x", image="outside/a.png"), r"line 2: image .* is a link out of"),
    "a long line": (b'{"id": "' + b"a" * MAX_OBJECT_BYTES + b'"}', r"line 2 is longer than 16777216 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_named_or_skipped_and_counted(name: str, tmp_path: Path, caplog: Any) -> None:
    damaged, expected = DAMAGED[name]
    root = write_jsonl(tmp_path / "root", [good(), damaged, good(id="last")])
    (root / "empty.png").touch()
    (tmp_path / "away").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "away/a.png")
    (root / "out.png").symlink_to(tmp_path / "away/a.png")
    (root / "outside").symlink_to(tmp_path / "away")
    with pytest.raises(DataError, match=expected):
        load_records(DataConfig(source="jsonl", path=root), "train")
    with caplog.at_level(logging.WARNING):
        kept = load_records(DataConfig(source="jsonl", path=root, on_error="skip"), "train")
    assert [record.record_id for record in kept] == ["train/good", "train/last"]
    assert "1 damaged records skipped, 2 kept" in caplog.text


def test_a_line_of_a_gigabyte_is_passed_over_and_never_held(tmp_path: Path, caplog: Any) -> None:
    root = write_jsonl(tmp_path, [good()])
    with (root / "train.jsonl").open("r+b") as file:
        file.seek(2**30)
        file.write(b"\n" + json.dumps(good(id="last")).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING):
        kept = load_records(DataConfig(source="jsonl", path=root, on_error="skip"), "train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert [record.record_id for record in kept] == ["train/good", "train/last"]
    assert "line 2 is longer than 16777216 bytes; correct or drop it" in caplog.text


def test_missing_and_empty_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path, [])
    with pytest.raises(DataError, match=r"train\.jsonl: no usable record"):
        load_jsonl(tmp_path, "train")
    with pytest.raises(DataError, match=r"val\.jsonl: cannot be read .* check data\.path"):
        load_jsonl(tmp_path, "val")


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    root = write_jsonl(tmp_path, [good(image="link.png")])
    (root / "link.png").symlink_to(root / "pictures/3.png")
    assert load_jsonl(root, "train")[0].load_images()[0].getpixel((0, 0)) == (3, 0, 0)


def test_a_file_that_changes_after_it_was_indexed_is_noticed(tmp_path: Path) -> None:
    records = load_jsonl(write_jsonl(tmp_path, [good(), good(id="second")]), "train")
    write_jsonl(tmp_path, [good(id="a longer one"), good(id="second")])
    with pytest.raises(DataError, match=r"byte 0: no valid JSON"):
        records[0]


def test_views_agree_with_plain_lists(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries: list[dict[str, Any] | bytes] = []
    for n in range(40):
        questions = [
            {"question": f"{n}.{q}?", "answer": int(rng.integers(4)), "kind": str(rng.choice(["a", "b", "c"]))}
            for q in range(rng.integers(1, 5))
        ]
        entries.append({"image": f"pictures/{n % 4}.png", "questions": questions})
    records = load_jsonl(write_jsonl(tmp_path, entries), "train")
    plain = list(records)
    assert (len(records), list(records[3:30:4]), records[-1]) == (40, plain[3:30:4], plain[-1])
    with pytest.raises(IndexError):
        records[40]

    def without(keep: Any) -> list[Any]:
        kept = [replace(r, questions=tuple(q for q in r.questions if keep(q))) for r in plain]
        return [r for r in kept if r.questions]

    assert list(records.without_kinds(["a", "?"])) == without(lambda q: q.kind != "a")
    assert list(records.without_answers({"1", "2"})) == without(lambda q: q.answer not in "12")
    both = without(lambda q: q.kind != "a" and q.answer != "3")
    assert list(records.without_kinds(["a"]).without_answers({"3"})) == both
    view = records.without_kinds(["a"]).without_answers({"3"})[5:]
    asked = [q for r in both[5:] for q in r.questions]
    assert view.kinds() == Counter(q.kind for q in asked)
    assert view.answers("b") == Counter(q.answer for q in asked if q.kind == "b")
    assert list(records.with_answers({"1", "2"})) == without(lambda q: q.answer in "12")
    order = rng.permutation(len(view))
    shuffled = view.with_questions_of(order)
    assert [r.questions for r in shuffled] == [both[5:][i].questions for i in order]
    assert [r.record_id for r in shuffled] == [r.record_id for r in both[5:]]
    assert shuffled.kinds() == view.kinds()
