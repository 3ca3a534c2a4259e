"""Reader of WebDataset tars: ROOT/SPLIT.tar, ROOT/SPLIT-*.tar, ROOT/data/SPLIT-*.tar or ROOT/SPLIT/*.tar.

Members whose names agree up to the first dot of the last part are one sample and stand together: KEY.json and one or
more images, KEY.jpg or KEY.0.jpg, KEY.1.jpg, … in the order of their names. KEY.json holds `questions`, or `question`,
`answer`, `kind`, and perhaps `id` and `scene`, as a line of source jsonl does. Other members are ignored, nothing is
unpacked: images are read at their place in the tar, which therefore must not be compressed.

Checked: the rule for keys and the order of members, against webdataset's documentation of its format.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import Section
from shared.errors import DataError
from trainer.data.fields import MAX_IMAGES, parse_object, questions_of
from trainer.data.images import ImageSpan
from trainer.data.index import QuestionColumns, Records
from trainer.data.jsonl import identity_of, scene_of
from trainer.data.records import OnError, Record, raise_error
from trainer.data.spans import MAX_OBJECT_BYTES, Span, Spans, progress_bar
from trainer.data.tables import split_files

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass(slots=True)
class _Sample:
    """Places of a sample's members: offset and length."""

    key: str
    text: tuple[int, int] | None = None
    images: list[tuple[str, int, int]] = field(default_factory=list)


def load_webdataset(
    root: Path, split: str, on_error: OnError = raise_error, _options: Section | None = None
) -> Records:
    """Records of one split in the order of the tars; images stay in the tar until they are read.

    Damaged samples go to `on_error`, which raises or counts them; a damaged tar gives what stands before the damage.
    """
    files = split_files(root, split, "tar")
    columns, texts, keys = QuestionColumns(), Spans(files), list[str]()
    image_starts, image_offsets, image_lengths, tars = array("q", [0]), array("q"), array("i"), array("h")
    seen: set[int] = set()
    for number, file in enumerate(files):
        for sample in _samples(file, on_error):
            where = f"{file}: sample {sample.key!r}"
            try:
                span = _text(file, sample, where)
                name, questions = identity_of(span.fields, sample.key, where), questions_of(span.fields, where)
                scene_of(span.fields, where)
            except DataError as error:
                on_error(error)
                continue
            if hash(name) in seen:
                on_error(DataError(f"{where}: id {name!r} is used twice; rename one"))
                continue
            seen.add(hash(name))
            for question in questions:
                columns.append(len(keys), question)
            texts.append(number, span)
            keys.append(sample.key)
            tars.append(number)
            for _, offset, length in sorted(sample.images):
                image_offsets.append(offset)
                image_lengths.append(length)
            image_starts.append(len(image_offsets))
    if not keys:
        raise DataError(f"{files[0]}: no usable record; check data.path and data.split names")

    def build(n: int, _questions: np.ndarray) -> Record:
        file = files[tars[n]]
        where = f"{file}: sample {keys[n]!r}"
        (fields,) = texts.read(n)
        places = range(image_starts[n], image_starts[n + 1])
        images = tuple(ImageSpan(file, image_offsets[i], image_lengths[i]) for i in places)
        name = identity_of(fields, keys[n], where)
        return Record(f"{split}/{name}", "webdataset", images, questions_of(fields, where), scene_of(fields, where))

    return columns.records(build, len(keys))


def _samples(file: Path, on_error: OnError) -> Iterator[_Sample]:
    """Samples of a tar. Where it is damaged, the rest goes to `on_error` as one error."""
    size = file.stat().st_size
    sample: _Sample | None = None
    try:
        with tarfile.open(file, "r:") as tar, progress_bar(f"reading {file.name}", size) as show:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
                show(member.offset)
                key, ending = _key(member.name)
                if not member.isreg() or member.issparse() or member.offset_data + member.size > size:
                    if ending == ".json" or ending.endswith(_IMAGES):
                        on_error(DataError(f"{file}: member {member.name!r} is no whole plain file; pack it again"))
                    continue
                if sample is not None and sample.key != key:
                    yield sample
                    sample = None
                sample = sample or _Sample(key)
                if ending == ".json":
                    sample.text = (member.offset_data, member.size)
                elif ending.endswith(_IMAGES):
                    sample.images.append((ending, member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        on_error(DataError(f"{file}: no readable tar ({reason}); unpack a compressed one, copy a damaged one again"))
    if sample is not None:
        yield sample


def _key(name: str) -> tuple[str, str]:
    """Key and ending of a member: all up to the first dot of the last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return folder + slash + stem, (dot + ending).lower()


def _text(file: Path, sample: _Sample, where: str) -> Span:
    if sample.text is None:
        raise DataError(f"{where}: no .json; pack it again")
    if not 0 < len(sample.images) <= MAX_IMAGES:
        raise DataError(f"{where}: {len(sample.images)} images, not 1 to {MAX_IMAGES}; pack it again")
    offset, length = sample.text
    if length > MAX_OBJECT_BYTES:
        raise DataError(f"{where}: its .json has {length} bytes, more than {MAX_OBJECT_BYTES}; pack it again")
    with file.open("rb") as content:
        content.seek(offset)
        fields: dict[str, Any] = parse_object(content.read(length), where)
    return Span(sample.key, offset, length, fields, where)
