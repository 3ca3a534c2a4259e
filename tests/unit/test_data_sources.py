"""Every source on a small data set in its published layout, and on each kind of damage that its format can have."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config import DataConfig
from shared.errors import ConfigError, DataError
from tests.data_samples import (
    RECORDS,
    SAMPLES,
    TABLE_COLUMNS,
    add_member,
    asked,
    gqa_questions,
    png,
    rows_of_tables,
    tallyqa_entry,
    write_image,
    write_json,
)
from trainer.data import SOURCES, load_records


def loaded(fields: dict[str, Any], split: str = "train", **more: Any) -> Any:
    return load_records(DataConfig.model_validate({**fields, **more}), split)


def numbers(records: Any) -> list[int]:
    """Which pictures the records show."""
    return [image.getpixel((0, 0))[0] // 10 for record in records for image in record.load_images()]


def test_every_source_has_a_sample() -> None:
    assert {"toy", *(fields.partition("_")[0] for fields in SAMPLES)} == set(SOURCES)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_source_gives_the_same_records(name: str, tmp_path: Path) -> None:
    records = loaded(SAMPLES[name](tmp_path, ("train",)))
    assert len(records) == RECORDS
    assert numbers(records) == list(range(RECORDS))
    assert len({record.record_id for record in records}) == RECORDS
    for n, record in enumerate(records):
        pairs = [(question.text, question.answer) for question in record.questions]
        if name == "tallyqa":
            assert [answer for _, answer in pairs] == [str(n)] * 3
        else:
            assert pairs == [(question, answer) for question, answer, _ in asked(n)]
        assert record.source == name.partition("_")[0]
    kinds = {"gqa": {"query": 12, "verify": 6}, "tallyqa": {"complex": 6, "simple": 12}}
    assert records.kinds() == kinds.get(name.partition("_")[0], {"count": 12, "exist": 6})


@pytest.mark.parametrize("name", SAMPLES)
def test_a_split_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"check data\.path|data\.path must name"):
        loaded(SAMPLES[name](tmp_path, ("train",)), "validation")


def test_sources_and_their_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source: 'gpa' is not known; use one of clevr, toy, gqa"):
        loaded({"source": "gpa", "path": tmp_path})
    with pytest.raises(ConfigError, match=r"data\.options of source gqa: questions: .*'balanced' or 'all', got 'most'"):
        loaded({"source": "gqa", "path": tmp_path, "options": {"questions": "most"}})
    with pytest.raises(ConfigError, match=r"data\.options of source webdataset: columns: unknown key"):
        loaded({"source": "webdataset", "path": tmp_path, "options": {"columns": {}}})


def test_gqa_takes_scene_graphs_other_kinds_and_the_files_of_all_questions(tmp_path: Path) -> None:
    fields = SAMPLES["gqa"](tmp_path, ("train",))
    records = loaded(fields, options={"kinds": "semantic"})
    assert records.kinds() == {"attr": 18}
    assert [bool(record.scene) for record in records] == [True, False] * 3
    shutil.rmtree(tmp_path / "sceneGraphs")
    assert not loaded(fields)[0].scene
    entries = list(gqa_questions().items())
    for part in (0, 1):
        file = tmp_path / f"questions1.2/train_all_questions/train_all_questions_{part}.json"
        write_json(file, dict(entries[9 * part :][:9]))
    everything = loaded(fields, options={"questions": "all"})
    assert [(r.record_id, r.questions) for r in everything] == [(r.record_id, r.questions) for r in loaded(fields)]


def test_tallyqa_without_issimple_is_of_unknown_kind(tmp_path: Path) -> None:
    fields = SAMPLES["tallyqa"](tmp_path, ("train",))
    write_json(tmp_path / "train.json", [tallyqa_entry(1, "how many?", 2, None)])
    assert loaded(fields).kinds() == {"unknown": 1}


def test_several_images_in_a_tar_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add_member(tar, "a/x.1.png", png(1))
        add_member(tar, "a/x.0.png", png(0))
        add_member(tar, "a/x.json", json.dumps({"question": "alike?", "answer": False}).encode())
    (record,) = loaded({"source": "webdataset", "path": tmp_path})
    assert (record.record_id, numbers([record])) == ("train/a/x", [0, 1])
    assert record.questions[0].answer == "no"


def test_columns_of_a_table_one_question_a_row(tmp_path: Path) -> None:
    rows = [{"image": png(n), "left": png(n + 1), "question": "how many?", "answer": float(n)} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    records = loaded({"source": "parquet", "path": tmp_path, "options": {"columns": {"image": ["image", "left"]}}})
    assert numbers(records) == [0, 1, 1, 2, 2, 3, 3, 4]
    assert [record.questions[0].answer for record in records] == ["0", "1", "2", "3"]
    assert numbers(records[::-1]) == [3, 4, 2, 3, 1, 2, 0, 1]


def test_a_folder_of_images_with_metadata_and_images_outside_of_it(tmp_path: Path) -> None:
    """The library gives paths instead of bytes for it; only those below the folder are read."""
    lines = []
    for n in range(3):
        write_image(tmp_path / f"root/train/{n}.png", n)
        lines.append(json.dumps({"file_name": f"{n}.png", "question": "how many?", "answer": str(n)}))
    (tmp_path / "root/train/metadata.jsonl").write_text("\n".join(lines))
    records = loaded({"source": "datasets", "path": tmp_path / "root"})
    assert numbers(records) == [0, 1, 2]
    write_image(tmp_path / "outside.png", 5)
    row = {"image": {"bytes": None, "path": str(tmp_path / "outside.png")}, "question": "how many?", "answer": "5"}
    datasets.Dataset(pa.Table.from_pylist([row])).save_to_disk(tmp_path / "saved/train")
    with pytest.raises(DataError, match=r"image of record train/0 cannot be read \(.*outside\.png lies outside of"):
        loaded({"source": "datasets", "path": tmp_path / "saved"})[0].load_images()


Damage = Callable[[Path], None]


def change_questions(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Of the first question of GQA's image 0."""

    def damage(root: Path) -> None:
        file = root / "questions1.2/train_balanced_questions.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def set_field(**fields: Any) -> Damage:
    return change_questions(lambda content: content["0train00"].update(fields))


def replace_text(old: bytes, new: bytes) -> Damage:
    def damage(root: Path) -> None:
        file = root / "questions1.2/train_balanced_questions.json"
        file.write_bytes(file.read_bytes().replace(old, new, 1))

    return damage


def without_image(root: Path) -> None:
    (root / "images/2300000.jpg").unlink()


GQA_DAMAGES: dict[str, tuple[Damage, str, int]] = {
    "no answer": (set_field(answer=None), r"question 0train00: no answer; test-split files", 17),
    "NaN": (set_field(answer=float("nan")), r"question 0train00: the answer is nan", 17),
    "no types": (set_field(types=None), r"question 0train00: no types\.structural", 17),
    "no object": (change_questions(lambda c: c.update({"0train00": 3})), r"question 0train00: not a JSON object", 17),
    "traversal": (set_field(imageId="../../x"), r"image '\.\./\.\./x\.jpg' leads out of", 17),
    "image id": (set_field(imageId=["2300000"]), r"question 0train00: imageId is no text", 17),
    "invalid UTF-8": (
        replace_text(b"red circle", b"red \xff"),
        r"question 0train01: no valid JSON \('utf-8' codec",
        17,
    ),
    "duplicate id": (replace_text(b'"0train01"', b'"0train00"'), r"the id '0train00' is used twice", 17),
    "missing image": (without_image, r"2300000\.jpg: image is missing; restore the file", 15),
}


@pytest.mark.parametrize("name", GQA_DAMAGES)
def test_damage_in_gqa_is_named_or_skipped_and_counted(name: str, tmp_path: Path, caplog: Any) -> None:
    fields = SAMPLES["gqa"](tmp_path, ("train",))
    damage, expected, kept = GQA_DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=expected):
        loaded(fields)
    with caplog.at_level(logging.WARNING):
        records = loaded(fields, on_error="skip")
    assert sum(len(record.questions) for record in records) == kept
    assert "1 damaged records skipped" in caplog.text


def test_images_and_graphs_of_gqa_that_are_there_twice_are_named_or_skipped(tmp_path: Path, caplog: Any) -> None:
    hub = SAMPLES["gqa_hub"](tmp_path / "hub", ("train",))
    file = tmp_path / "hub/train_balanced_images/train-00001-of-00002.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[2]["id"] = "2300000"  # picture 5 as a second picture 0
    pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(DataError, match=r"train-00001-.*: row 2: the image id '2300000' is used twice"):
        loaded(hub)
    with caplog.at_level(logging.WARNING):
        assert numbers(loaded(hub, on_error="skip")) == [0, 1, 2, 3, 4]
    assert "4 damaged records skipped" in caplog.text  # and the three questions about picture 5
    fields = SAMPLES["gqa"](tmp_path / "files", ("train",))
    graphs = tmp_path / "files/sceneGraphs/train_sceneGraphs.json"
    graphs.write_text(graphs.read_text().replace('"2300002"', '"2300000"'))
    with pytest.raises(DataError, match=r"scene graph 2300000 stands there twice; drop one of them"):
        loaded(fields)
    assert [bool(r.scene) for r in loaded(fields, on_error="skip")] == [True, False, False, False, True, False]


TALLYQA_DAMAGES = {
    r"record 1: answer 'two' is no count": {"answer": "two"},
    r"record 1: answer '-1' is no count": {"answer": -1},
    r"record 1: issimple is 'maybe'": {"issimple": "maybe"},
    r"record 1: question_id 30000000 is used twice": {"question_id": 30_000_000},
    r"record 1: image is no text": {"image": {"path": "x.jpg"}},
    r"image '\.\./x\.jpg' leads out of": {"image": "../x.jpg"},
}


@pytest.mark.parametrize("expected", TALLYQA_DAMAGES)
def test_damage_in_tallyqa_is_named_or_skipped(expected: str, tmp_path: Path) -> None:
    fields = SAMPLES["tallyqa"](tmp_path, ("train",))
    content = json.loads((tmp_path / "train.json").read_text())
    content[1].update(TALLYQA_DAMAGES[expected])
    write_json(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=expected):
        loaded(fields)
    assert sum(len(record.questions) for record in loaded(fields, on_error="skip")) == 17


TABLE_DAMAGES: dict[str, dict[str, Any]] = {
    r"row 1: question is no text": {"texts": [{"user": 3, "assistant": "x", "source": "y"}]},
    r"row 1: no answer": {"texts": [{"user": "a?", "assistant": None, "source": "y"}]},
    r"row 1: 0 questions": {"texts": []},
    r"row 1: no question, answer": {"texts": None},
    r"row 1: id 'r0' is used twice": {"key": "r0"},
    r"row 1: id is no text": {"key": None},
}


@pytest.mark.parametrize("source", ["parquet", "datasets"])
@pytest.mark.parametrize("expected", list(TABLE_DAMAGES))
def test_damage_in_tables_is_named_or_skipped(source: str, expected: str, tmp_path: Path) -> None:
    rows = rows_of_tables()
    rows[1].update(TABLE_DAMAGES[expected])
    if "question is no text" in expected:
        for row in rows:  # a column of numbers where texts should be is wrong in every row
            row["texts"] = [{"user": 3, "assistant": "x", "source": "y"}]
    table = pa.Table.from_pylist(rows)
    if source == "parquet":
        pq.write_table(table, tmp_path / "train.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "train")
    fields = {"source": source, "path": tmp_path, "options": {"columns": TABLE_COLUMNS}}
    if "question is no text" in expected:
        with pytest.raises(DataError, match="no usable record in split train"):
            loaded(fields, on_error="skip")
        expected = expected.replace("row 1", "row 0")
    else:
        assert numbers(loaded(fields, on_error="skip")) == [0, 2, 3, 4, 5]
    with pytest.raises(DataError, match=expected):
        loaded(fields)


@pytest.mark.parametrize("source", ["parquet", "datasets"])
def test_wrong_columns_and_images_without_bytes_are_named(source: str, tmp_path: Path) -> None:
    fields = SAMPLES[source](tmp_path, ("train",))
    for wrong in ({"id": "name"}, {"image": ["name"]}):
        with pytest.raises(DataError, match=r"no column 'name', only .*; set data\.options\.columns"):
            loaded({**fields, "options": {"columns": {**TABLE_COLUMNS, **wrong}}})
    row = {**rows_of_tables()[0], "picture": {"bytes": None, "path": None}}
    table = pa.Table.from_pylist([row, rows_of_tables()[1]])
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    if source == "parquet":
        pq.write_table(table, tmp_path / "train.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "train")
    with pytest.raises(DataError, match=r"row 0, column 'picture': image of record train/r0 .*no image bytes"):
        loaded(fields)[0].load_images()


def test_a_damaged_parquet_file_is_named_or_skipped(tmp_path: Path) -> None:
    fields = SAMPLES["parquet"](tmp_path, ("train",))
    file = tmp_path / "data/train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet: no readable parquet"):
        loaded(fields)
    assert numbers(loaded(fields, on_error="skip")) == [3, 4, 5]


def write_tar(root: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(root / "train-00.tar", "w") as tar:
        for name, content in members:
            add_member(tar, name, content)


def good_sample(n: int) -> list[tuple[str, bytes]]:
    text = json.dumps({"question": "how many?", "answer": n}).encode()
    return [(f"{n}.json", text), (f"{n}.png", png(n))]


TAR_DAMAGES: dict[str, list[tuple[str, bytes]]] = {
    r"sample 'x': no \.json": [("x.png", png(1))],
    r"sample 'x': 0 images": [("x.json", b'{"question": "a?", "answer": 1}')],
    r"sample 'x': no valid JSON": [("x.json", b"\xff"), ("x.png", png(1))],
    r"sample 'x': no answer": [("x.json", b'{"question": "a?"}'), ("x.png", png(1))],
    r"sample 'x': id '0' is used twice": [("x.json", b'{"id": 0, "question": "a?", "answer": 1}'), ("x.png", png(1))],
}


@pytest.mark.parametrize("expected", TAR_DAMAGES)
def test_damage_in_a_tar_is_named_or_skipped(expected: str, tmp_path: Path) -> None:
    write_tar(tmp_path, [*good_sample(0), *TAR_DAMAGES[expected], *good_sample(2)])
    fields = {"source": "webdataset", "path": tmp_path}
    with pytest.raises(DataError, match=expected):
        loaded(fields)
    assert numbers(loaded(fields, on_error="skip")) == [0, 2]


def test_a_tar_that_is_cut_short_compressed_or_holds_links(tmp_path: Path) -> None:
    write_tar(tmp_path, [*good_sample(0), *good_sample(1)])
    fields = {"source": "webdataset", "path": tmp_path}
    whole = (tmp_path / "train-00.tar").read_bytes()
    (tmp_path / "train-00.tar").write_bytes(whole[: 5 * 512 + 40])
    with pytest.raises(DataError, match=r"train-00\.tar: (no readable tar|member '1\.json' is no whole plain file)"):
        loaded(fields)
    assert numbers(loaded(fields, on_error="skip")) == [0]
    with tarfile.open(tmp_path / "train-00.tar", "w:gz") as tar:
        add_member(tar, "0.png", png(0))
    with pytest.raises(DataError, match=r"no readable tar .*unpack a compressed one"):
        loaded(fields)
    with tarfile.open(tmp_path / "train-00.tar", "w") as tar:
        add_member(tar, *good_sample(0)[0])
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link, io.BytesIO())
    with pytest.raises(DataError, match=r"member '0\.png' is no whole plain file"):
        loaded(fields)


@pytest.mark.parametrize("name", ["clevr", "gqa", "tallyqa", "jsonl"])
def test_images_need_not_be_looked_at_beforehand(name: str, tmp_path: Path) -> None:
    fields = SAMPLES[name](tmp_path, ("train",))
    path = loaded(fields)[0].images[0].path
    path.unlink()
    records = loaded(fields, options={"check_images": False})
    with pytest.raises(DataError, match=r"image of record .* cannot be read"):
        records[0].load_images()
    path.symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="is a link out of"):
        loaded(fields, options={"check_images": False})
