"""How fast every source gives records, what an index of a million records weighs, how long a step waits for images.

    make data-figures        --tiny tries the code out in a minute

Data sets are written to runs/data-figures first, which takes a few minutes and is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from shared.config import Config, DataConfig
from tests.benchmarks.results import Result, record
from tests.benchmarks.runs import open_trainer, run_config
from tests.data_samples import add_member, gqa_entry, png, tallyqa_entry
from tests.tiny_models import build_tiny
from trainer.data import load_records
from trainer.methods import METHODS
from trainer.methods.base import LossParts, Method

COMMAND = "make data-figures"
DATA = Path("runs/data-figures")
STEP_S = 0.2
MEGAPIXEL = (1024, 1024)
_READ = 2000
"""Records that are read in random order for the rate of a source."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Sizes:
    """records: of the index, by source where it is more. steps: that wait for images."""

    records: int
    steps: int


FULL, TINY = Sizes(1_000_000, 100), Sizes(2_000, 10)


def question(n: int, q: int) -> tuple[str, str]:
    """Texts of the length that questions have, with many different words."""
    return f"is there a small red thing to the left of object {n % 97} and {q}?", ("yes", "no", str(n % 11))[q % 3]


def write_jsonl(root: Path, n: int) -> None:
    with (root / "train.jsonl").open("w") as file:
        for i in range(n):
            asked = [dict(zip(("question", "answer"), question(i, q), strict=True), kind="exist") for q in range(3)]
            file.write(json.dumps({"id": i, "image": f"pictures/{i % 100}.png", "questions": asked}) + "\n")


def write_clevr(root: Path, n: int) -> None:
    (root / "questions").mkdir()
    (root / "scenes").mkdir()
    functions = ("scene", "unique", "exist")
    program = [{"function": name, "inputs": [k], "value_inputs": []} for k, name in enumerate(functions)]
    cube = {"shape": "cube", "color": "red", "size": "small", "material": "metal", "3d_coords": [1.5, 0.2, 0.7]}
    with (root / "questions/CLEVR_train_questions.json").open("w") as file:
        file.write('{"info": {"split": "train"}, "questions": [')
        for i in range(n):
            text, answer = question(i, i)
            entry = {"image_index": i, "image_filename": f"CLEVR_train_{i:06d}.png", "program": program}
            file.write(("," if i else "") + json.dumps({**entry, "question": text, "answer": answer}))
        file.write("]}")
    with (root / "scenes/CLEVR_train_scenes.json").open("w") as file:
        file.write('{"info": {"split": "train"}, "scenes": [')
        for i in range(n):
            entry = {"image_index": i, "image_filename": f"CLEVR_train_{i:06d}.png", "objects": [cube] * 5}
            file.write(("," if i else "") + json.dumps(entry))
        file.write("]}")


def write_gqa(root: Path, n: int) -> None:
    with (root / "train_balanced_questions.json").open("w") as file:
        for i in range(n):
            text, answer = question(i, i)
            entry = json.dumps({**gqa_entry(i, text, answer), "imageId": str(i)})
            file.write(("," if i else "{") + f'"{i:09d}": {entry}')
        file.write("}")


def write_tallyqa(root: Path, n: int) -> None:
    with (root / "train.json").open("w") as file:
        for i in range(n):
            entry = {**tallyqa_entry(i, question(i, i)[0], i % 16, bool(i % 2)), "question_id": i}
            file.write(("," if i else "[") + json.dumps(entry))
        file.write("]")


def _batches(n: int) -> Iterator[pa.Table]:
    image = {"bytes": png(1), "path": None}
    for first in range(0, n, 10_000):
        texts = [question(i, i) for i in range(first, min(n, first + 10_000))]
        columns = {"image": [image] * len(texts), "question": [q for q, _ in texts], "answer": [a for _, a in texts]}
        yield pa.table(columns)


def write_parquet(root: Path, n: int) -> None:
    writer = None
    for table in _batches(n):
        writer = writer or pq.ParquetWriter(root / "train.parquet", table.schema)
        writer.write_table(table, row_group_size=100)
    if writer is not None:
        writer.close()


def write_dataset(root: Path, n: int) -> None:
    datasets.Dataset(pa.concat_tables(_batches(n))).save_to_disk(root / "train")


def write_webdataset(root: Path, n: int) -> None:
    with tarfile.open(root / "train.tar", "w") as tar:
        for i in range(n):
            text, answer = question(i, i)
            add_member(tar, f"{i:09d}.png", png(1))
            add_member(tar, f"{i:09d}.json", json.dumps({"question": text, "answer": answer}).encode())


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "clevr": write_clevr,
    "gqa": write_gqa,
    "tallyqa": write_tallyqa,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "datasets": write_dataset,
    "webdataset": write_webdataset,
}
_WITH_FILES = ("clevr", "gqa", "tallyqa", "jsonl")


def written(source: str, n: int) -> DataConfig:
    """A data set of n records, made unless it is there. Sources with images in files get no images."""
    root = DATA / f"{source}-{n}"
    if not root.is_dir():
        partial = root.with_name(f".{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        WRITERS[source](partial, n)
        partial.rename(root)
    options = {"check_images": False} if source in _WITH_FILES else {}
    return DataConfig(source=source, path=root, options=options)


def _measure(source: str, n: int, queue: Any) -> None:
    """In a process of its own: seconds to index, resident bytes that it added, its peak, records a second."""
    process = psutil.Process()
    config = written(source, 1)  # imports are not part of the index
    load_records(config, "train")
    before = process.memory_info().rss
    config = written(source, n)
    started = time.perf_counter()
    records = load_records(config, "train")
    indexed = time.perf_counter() - started
    resident = process.memory_info().rss - before
    places = np.random.default_rng(0).permutation(len(records))[:_READ]
    started = time.perf_counter()
    for place in places:
        assert records[int(place)].questions
    read = time.perf_counter() - started
    queue.put((len(records), indexed, resident, process.memory_info().rss, len(places) / read))


def source_rows(source: str, n: int) -> list[Result]:
    """Figures of one source."""
    written(source, 1)
    written(source, n)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(source, n, queue))
    process.start()
    n_records, indexed, resident, total, rate = queue.get()
    process.join()
    name = f"{source}, {n_records:,} records"
    at_scale = n_records >= FULL.records
    bar = "≤ 1.5 GiB for 1 M records" if at_scale else "–"
    met = resident <= 1.5 * _GIB if at_scale else None

    def row(figure: str, value: float, unit: str, bar: str = "–", met: bool | None = None, n: int = 1) -> Result:
        return Result(f"{name}: {figure}", value, unit, bar, met, value, value, n, COMMAND)

    return [
        row("index in memory", resident / _GIB, "GiB resident above the bare process", bar, met),
        row("the whole process", total / _GIB, "GiB resident"),
        row("indexed", n_records / indexed, "records/s"),
        row("read in random order, without images", rate, "records/s", n=_READ),
    ]


class SleepingMethod(Method):
    """A step that leaves the CPU alone for 200 ms, as one on a GPU would."""

    needs_anchors = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.weight = nn.Linear(1, 1)

    @property
    def extra_modules(self) -> nn.Module:
        return self.weight

    def emit(self, batch: Any, tokens: Any, step: int) -> None:
        time.sleep(STEP_S)

    def loss(self, emitted: None, step: int) -> LossParts:
        total: Tensor = self.weight(torch.ones(1)).square().sum()
        return LossParts(total, {}, {})

    def validation_nll(self, features: Any, records: Any) -> float:
        return 0.0


def waiting_config(folder: Path) -> Config:
    """Four one-megapixel JPEGs a step, through the image processor of Qwen2.5-VL."""
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for n in range(32):
        coarse = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        coarse.resize(MEGAPIXEL, Image.Resampling.BICUBIC).save(pictures / f"{n}.jpg", quality=90)
        lines.append(json.dumps({"image": f"pictures/{n}.jpg", "question": "what color is it?", "answer": "red"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    model = str(build_tiny("qwen2_5_vl", folder / "model", "float32"))
    METHODS["sleeping"] = SleepingMethod
    data = {"source": "jsonl", "path": str(folder), "questions_per_image": 1}
    return run_config({"model": model}, [], method="sleeping", data=data, train={"batch_images": 4})


def waiting_rows(n_steps: int) -> list[Result]:
    """How long steps of 200 ms wait for their images; the first step, which nothing overlaps, is left out."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        config = waiting_config(Path(name))
        trainer = stack.enter_context(open_trainer(config, load_records(config.data, "train")))
        # The tower would run on the GPU; here it would take the cores that the loader needs.
        trainer.features.tokens = lambda images: None  # type: ignore[assignment,method-assign]
        metrics = [trainer.step(step) for step in range(n_steps + 1)][1:]
    shares = [100 * step["data_wait_ms"] / step["step_ms"] for step in metrics]
    share = sum(step["data_wait_ms"] for step in metrics) / sum(step["step_ms"] for step in metrics)
    figure = "step of 200 ms, four JPEGs of 1 megapixel: data_wait_ms"
    return [
        Result(figure, 100 * share, "% of step_ms; smallest – largest step", "≤ 2 %", share <= 0.02,
               min(shares), max(shares), n_steps, COMMAND),
        Result("the same: median step", statistics.median(step["step_ms"] for step in metrics), "ms", "–", None,
               min(step["step_ms"] for step in metrics), max(step["step_ms"] for step in metrics), n_steps, COMMAND),
    ]  # fmt: skip


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes; prints, records nothing")
    parser.add_argument("--only", choices=[*WRITERS, "waiting"], help="measure one part")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    parts = [arguments.only] if arguments.only else [*WRITERS, "waiting"]
    for part in parts:
        rows = waiting_rows(sizes.steps) if part == "waiting" else source_rows(part, sizes.records)
        for row in rows:
            print(f"{row.figure}: {row.value:.4g} {row.unit} (bar {row.bar}, met {row.met})", flush=True)
        if not arguments.tiny:
            record(rows)


if __name__ == "__main__":
    main()
