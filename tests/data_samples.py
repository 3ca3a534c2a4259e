"""Small data sets in the layout of every source, and where the parts of a record lie in them.

`SAMPLES[source](root, splits)` writes the same six records for each split, three questions each, in the words of the
toy world, and returns the fields of a `data` section.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

RECORDS = 6
QUESTIONS = [("how many things are there?", "3", "count"), ("is there a red circle?", "yes", "exist")]
SPLITS = ("train", "val", "test")

Write = Callable[[Path, Sequence[str]], dict[str, Any]]


def picture(n: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """A picture that tells its number by its first pixel."""
    image = Image.new("RGB", size, (10 * n, 80, 160))
    image.paste((255, 0, 0), (8, 8, 20, 20))
    return image


def png(n: int) -> bytes:
    with io.BytesIO() as file:
        picture(n).save(file, "PNG")
        return file.getvalue()


def asked(n: int) -> list[tuple[str, str, str]]:
    """Question, answer and kind of record n."""
    return [*QUESTIONS, ("how many circles are there?", str(n), "count")]


def write_image(path: Path, n: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(n))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def clevr(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    for split in splits:
        names = [f"CLEVR_{split}_{n:06d}.png" for n in range(RECORDS)]
        questions = []
        for n, name in enumerate(names):
            write_image(root / f"images/{split}/{name}", n)
            for question, answer, kind in asked(n):
                program = [{"function": "scene", "inputs": []}, {"function": kind, "inputs": [0]}]
                entry = {"image_index": n, "image_filename": name, "split": split, "program": program}
                questions.append({**entry, "question": question, "answer": answer})
        scenes = [{"image_index": n, "image_filename": name, "objects": []} for n, name in enumerate(names)]
        write_json(root / f"questions/CLEVR_{split}_questions.json", {"info": {"split": split}, "questions": questions})
        write_json(root / f"scenes/CLEVR_{split}_scenes.json", {"info": {"split": split}, "scenes": scenes})
    return {"source": "clevr", "path": str(root)}


def gqa_entry(n: int, question: str, answer: str) -> dict[str, Any]:
    """A question as it is published, all fields."""
    structural = "query" if answer.isdecimal() else "verify"
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "circle (0)"}],
        "entailed": [],
        "equivalent": [],
        "question": question,
        "imageId": str(2_300_000 + n),
        "isBalanced": True,
        "groups": {"global": None, "local": "06-circle"},
        "answer": answer,
        "semanticStr": "select: circle (0)",
        "annotations": {"answer": {}, "question": {"4": "0"}, "fullAnswer": {}},
        "types": {"detailed": "existAttr", "semantic": "attr", "structural": structural},
        "fullAnswer": f"It is {answer}.",
    }


def gqa_questions(split: str = "train") -> dict[str, Any]:
    pairs = [(n, q) for q in range(3) for n in range(RECORDS)]  # an image's questions do not stand together
    return {f"0{split}{n}{q}": gqa_entry(n, asked(n)[q][0], asked(n)[q][1]) for n, q in pairs}


def gqa(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    for n in range(RECORDS):
        write_image(root / f"images/{2_300_000 + n}.jpg", n)
    graph = {"width": 48, "height": 48, "objects": {"1": {"name": "circle", "h": 2, "w": 2, "x": 0, "y": 0}}}
    for split in splits:
        write_json(root / f"questions1.2/{split}_balanced_questions.json", gqa_questions(split))
        graphs = {str(2_300_000 + n): graph for n in range(0, RECORDS, 2)}
        write_json(root / f"sceneGraphs/{split}_sceneGraphs.json", graphs)
    return {"source": "gqa", "path": str(root)}


def gqa_hub(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    for split in splits:
        rows = [{"id": key, **entry} for key, entry in gqa_questions(split).items()]
        kept = ("id", "imageId", "question", "answer", "types", "groups", "isBalanced")
        images = [{"id": str(2_300_000 + n), "image": {"bytes": png(n), "path": None}} for n in range(RECORDS)]
        tables = {"instructions": [{key: row[key] for key in kept} for row in rows], "images": images}
        for name, content in tables.items():
            folder = root / f"{split}_balanced_{name}"
            folder.mkdir(parents=True)
            for part in (0, 1):
                half = len(content) // 2
                rows_of_part = content[half * part :][:half]
                pq.write_table(pa.Table.from_pylist(rows_of_part), folder / f"{split}-0000{part}-of-00002.parquet")
    return {"source": "gqa", "path": str(root)}


def tallyqa_entry(n: int, question: str, answer: Any, is_simple: bool | None) -> dict[str, Any]:
    name = f"VG_100K_2/{n}.jpg" if n % 2 else f"val2014/COCO_val2014_{n:012d}.jpg"
    entry = {"answer": answer, "data_source": "imported_genome", "image": name, "image_id": 92_410_408 + n}
    return {**entry, "question": question, **({} if is_simple is None else {"issimple": is_simple})}


def tallyqa(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    for split in splits:
        entries = [
            {**tallyqa_entry(n, f"how many circles are there {q}?", n, q > 0), "question_id": 30_000_000 + 3 * n + q}
            for n in range(RECORDS)
            for q in range(3)
        ]
        write_json(root / f"{split}.json", entries)
        for n in range(RECORDS):
            write_image(root / entries[3 * n]["image"], n)
    return {"source": "tallyqa", "path": str(root)}


def jsonl(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    for n in range(RECORDS):
        write_image(root / f"pictures/{n}.png", n)
    for split in splits:
        records = [{"id": f"r{n}", "images": [f"pictures/{n}.png"], "questions": _objects(n)} for n in range(RECORDS)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"source": "jsonl", "path": str(root)}


def _objects(n: int) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer, "kind": kind} for question, answer, kind in asked(n)]


def rows_of_tables() -> list[dict[str, Any]]:
    """As the_cauldron has them: lists of images and of turns."""
    turns = [[{"user": q, "assistant": a, "source": k} for q, a, k in asked(n)] for n in range(RECORDS)]
    return [{"picture": {"bytes": png(n), "path": None}, "texts": turns[n], "key": f"r{n}"} for n in range(RECORDS)]


TABLE_COLUMNS = {
    "image": ["picture"],
    "question": "texts.user",
    "answer": "texts.assistant",
    "kind": "texts.source",
    "id": "key",
}


def parquet(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    (root / "data").mkdir(parents=True)
    for split in splits:
        for part in (0, 1):
            table = pa.Table.from_pylist(rows_of_tables()[3 * part :][:3])
            pq.write_table(table, root / f"data/{split}-0000{part}-of-00002.parquet", row_group_size=2)
    return {"source": "parquet", "path": str(root), "options": {"columns": TABLE_COLUMNS}}


def saved_dataset(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    rows = rows_of_tables()
    for row in rows:
        row["picture"] = [row["picture"]]
    turn = {name: datasets.Value("string") for name in ("user", "assistant", "source")}
    columns = {"picture": [datasets.Image()], "texts": [turn], "key": datasets.Value("string")}
    made = {split: datasets.Dataset.from_list(rows, features=datasets.Features(columns)) for split in splits}
    datasets.DatasetDict(made).save_to_disk(root)
    return {"source": "datasets", "path": str(root), "options": {"columns": TABLE_COLUMNS}}


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def webdataset(root: Path, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    root.mkdir(parents=True, exist_ok=True)
    for split in splits:
        for part in (0, 1):
            with tarfile.open(root / f"{split}-0{part}.tar", "w") as tar:
                for n in range(3 * part, 3 * part + 3):
                    add_member(tar, f"shard/r{n}.png", png(n))
                    add_member(tar, f"shard/r{n}.json", json.dumps({"id": f"r{n}", "questions": _objects(n)}).encode())
                    add_member(tar, f"shard/r{n}.cls", b"ignored")
    return {"source": "webdataset", "path": str(root)}


SAMPLES: dict[str, Write] = {
    "clevr": clevr,
    "gqa": gqa,
    "gqa_hub": gqa_hub,
    "tallyqa": tallyqa,
    "jsonl": jsonl,
    "parquet": parquet,
    "datasets": saved_dataset,
    "webdataset": webdataset,
}
