"""Odd and damaged images in every source: read as upright RGB; named with file and record or skipped and counted."""

from __future__ import annotations

import logging
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shared.config import DataConfig
from shared.errors import DataError
from tests import data_samples
from tests.data_samples import SAMPLES, rows_of_tables, write_json
from tests.unit.test_images import (
    animation,
    bomb,
    cmyk,
    encoded,
    exif_rotated,
    palette_with_transparency,
    sixteen_bit,
)
from trainer.data import ErrorPolicy, load_records, readable_records

DAMAGED = 2
"""The record whose image is another one."""


def cut_short() -> bytes:
    return encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900]


def write_with(source: str, image: bytes, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    png = data_samples.png
    monkeypatch.setattr(data_samples, "png", lambda n: image if n == DAMAGED else png(n))
    return SAMPLES[source](root, ("train",))


ODD: dict[Callable[[], bytes], tuple[tuple[int, int], tuple[int, int, int]]] = {
    cmyk: ((16, 8), (255, 0, 0)),
    sixteen_bit: ((16, 8), (128, 128, 128)),
    palette_with_transparency: ((16, 8), (255, 0, 0)),
    exif_rotated: ((8, 16), (255, 0, 0)),
    animation: ((16, 8), (255, 0, 0)),
}


@pytest.mark.parametrize("source", SAMPLES)
@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_odd_images_are_read_from_every_source(
    source: str, make: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, first = ODD[make]
    fields = write_with(source, make(), tmp_path, monkeypatch)
    records = load_records(DataConfig.model_validate(fields), "train")
    assert len(records) == 6
    (image,) = records[DAMAGED].load_images()
    assert (image.mode, image.size) == ("RGB", size)
    assert all(abs(a - b) <= 3 for a, b in zip(image.getpixel((0, 0)), first, strict=True))


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut short": (cut_short, "truncated"),
    "empty": (bytes, "cannot identify image file"),
    "bomb": (bomb, "400000000 pixels"),
}


@pytest.mark.parametrize("source", SAMPLES)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named_or_skipped_and_counted_in_every_source(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A header that is wrong is found when the index is built, if images are files; all else when they are decoded."""
    make, reason = BROKEN[name]
    config = DataConfig.model_validate(write_with(source, make(), tmp_path, monkeypatch))
    with pytest.raises(DataError, match=reason) as raised:
        readable_records(load_records(config, "train"), 6, ErrorPolicy("fail"))
    place = str(raised.value)
    # The record by its id or by its line or question, and the file that holds it.
    assert str(tmp_path) in place
    assert any(word in place for word in ("of record train/", "a record of", "a question of", "line 3"))
    skip = ErrorPolicy("skip")
    with caplog.at_level(logging.WARNING):
        records = load_records(config.model_copy(update={"on_error": "skip"}), "train")
        kept = readable_records(records, 6, skip)
    assert [record.load_images()[0].getpixel((0, 0))[0] // 10 for record in kept] == [0, 1, 3, 4, 5]
    assert caplog.text.count("skipped: ") == 1
    assert (len(records), skip.count) in ((5, 0), (6, 1))


def empty_clevr(root: Path) -> None:
    for folder, what in (("questions", "questions"), ("scenes", "scenes")):
        write_json(root / f"{folder}/CLEVR_train_{what}.json", {"info": {}, what: []})


def empty_gqa_hub(root: Path) -> None:
    for file in (root / "train_balanced_instructions").iterdir():
        pq.write_table(pq.read_table(file).slice(0, 0), file)


def empty_parquet(root: Path) -> None:
    for file in (root / "data").iterdir():
        pq.write_table(pq.read_table(file).slice(0, 0), file)


def empty_dataset(root: Path) -> None:
    table = pa.Table.from_pylist(rows_of_tables()).slice(0, 0)
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(root / "empty")


def empty_tar(root: Path) -> None:
    for file in root.iterdir():
        tarfile.open(file, "w").close()


EMPTY: dict[str, Callable[[Path], None]] = {
    "clevr": empty_clevr,
    "gqa": lambda root: write_json(root / "questions1.2/train_balanced_questions.json", {}),
    "gqa_hub": empty_gqa_hub,
    "tallyqa": lambda root: write_json(root / "train.json", []),
    "jsonl": lambda root: (root / "train.jsonl").write_text("\n"),
    "parquet": empty_parquet,
    "datasets": empty_dataset,
    "webdataset": empty_tar,
}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("source", SAMPLES)
def test_an_empty_split_is_an_error_in_every_source(source: str, on_error: str, tmp_path: Path) -> None:
    fields = SAMPLES[source](tmp_path, ("train",))
    EMPTY[source](tmp_path)
    if source == "datasets":
        fields["path"] = str(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no usable record.*check data\.path(,| and) data\.split names"):
        load_records(DataConfig.model_validate({**fields, "on_error": on_error}), "train")


@pytest.mark.parametrize("source", ["clevr", "gqa", "tallyqa"])
def test_a_gigabyte_in_one_string_is_never_held(source: str, tmp_path: Path) -> None:
    """Their files are one JSON value, so nothing behind such a string can be found: the file is refused."""
    fields = SAMPLES[source](tmp_path, ("train",))
    opening, file = {
        "clevr": ('{"questions": [{"question": "', "questions/CLEVR_train_questions.json"),
        "gqa": ('{"07": {"question": "', "questions1.2/train_balanced_questions.json"),
        "tallyqa": ('[{"question": "', "train.json"),
    }[source]
    with (tmp_path / file).open("r+b") as content:
        content.truncate(0)
        content.write(opening.encode())
        content.truncate(2**30)
    tracemalloc.start()
    for on_error in ("fail", "skip"):
        with pytest.raises(DataError, match=rf"{Path(file).name}: no valid JSON at byte \d+"):
            load_records(DataConfig.model_validate({**fields, "on_error": on_error}), "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 2**20
