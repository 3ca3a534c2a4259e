"""Training from every source, records/s, what an index of a million records weighs, how long a step waits for images.

    make data-figures        --tiny tries the code out in a minute

Data sets of a million records are written to runs/data-figures first (7 GB), which is not done again.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from shared.config import Config, DataConfig
from tests.benchmarks.results import Result, record
from tests.benchmarks.runs import open_trainer, run_config
from tests.data_samples import SAMPLES, add_member, gqa_entry, png, tallyqa_entry
from tests.tiny_models import build_tiny
from trainer.data import load_records
from trainer.loop import train_run
from trainer.methods import METHODS
from trainer.methods.base import LossParts, Method
from trainer.metrics import read_metrics

COMMAND = "make data-figures"
DATA = Path("runs/data-figures")
STEP_S = 0.2
MEGAPIXEL = (1024, 1024)
_ROWS = 10_000
"""Rows of a table that are made at once."""
_READ = 2000
"""Records that are read in random order for the rate of a source."""
_GIB = 2**30
TRAINED_STEPS = 50
_AT_AN_END = 5
"""Steps whose mean is the figure of a run's beginning and end."""
_MERGED_PX = 28
"""Side of what Qwen2.5-VL makes one visual token of."""


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
            name = f"CLEVR_train_{i:06d}.png"
            entry = {"question_index": i, "image_index": i, "image_filename": name, "program": program}
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


def write_gqa_hub(root: Path, n: int) -> None:
    def instructions(first: int, end: int) -> pa.Table:
        entries = [gqa_entry(i, *question(i, i)) for i in range(first, end)]
        names = ("question", "answer", "types")
        ids = [{"id": f"{i:09d}", "imageId": str(i)} for i in range(first, end)]
        return pa.Table.from_pylist([{**i, **{k: e[k] for k in names}} for i, e in zip(ids, entries, strict=True)])

    def images(first: int, end: int) -> pa.Table:
        image = {"bytes": png(1), "path": None}
        return pa.table({"id": [str(i) for i in range(first, end)], "image": [image] * (end - first)})

    for name, part in (("instructions", instructions), ("images", images)):
        (root / f"train_balanced_{name}").mkdir()
        write_tables(root / f"train_balanced_{name}/train-00000-of-00001.parquet", n, part)


def write_tables(file: Path, n: int, part: Callable[[int, int], pa.Table]) -> None:
    """A parquet file of n rows, made in parts."""
    first = part(0, 1)
    with pq.ParquetWriter(file, first.schema) as writer:
        for start in range(0, n, _ROWS):
            writer.write_table(part(start, min(n, start + _ROWS)), row_group_size=100)


def write_tallyqa(root: Path, n: int) -> None:
    with (root / "train.json").open("w") as file:
        for i in range(n):
            entry = {**tallyqa_entry(i, question(i, i)[0], i % 16, bool(i % 2)), "question_id": i}
            file.write(("," if i else "[") + json.dumps(entry))
        file.write("]")


def asked_rows(first: int, end: int) -> pa.Table:
    """One question and one image a row."""
    image = {"bytes": png(1), "path": None}
    texts = [question(i, i) for i in range(first, end)]
    columns = {"image": [image] * len(texts), "question": [q for q, _ in texts], "answer": [a for _, a in texts]}
    return pa.table(columns)


def write_parquet(root: Path, n: int) -> None:
    write_tables(root / "train.parquet", n, asked_rows)


def write_dataset(root: Path, n: int) -> None:
    parts = (asked_rows(first, min(n, first + _ROWS)) for first in range(0, n, _ROWS))
    datasets.Dataset(pa.concat_tables(parts)).save_to_disk(root / "train")


def write_webdataset(root: Path, n: int) -> None:
    with tarfile.open(root / "train.tar", "w") as tar:
        for i in range(n):
            text, answer = question(i, i)
            add_member(tar, f"{i:09d}.png", png(1))
            add_member(tar, f"{i:09d}.json", json.dumps({"question": text, "answer": answer}).encode())


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "clevr": write_clevr,
    "gqa": write_gqa,
    "gqa_hub": write_gqa_hub,
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
    return DataConfig(source=source.partition("_")[0], path=root, options=options)


def _measure(source: str, n: int) -> tuple[int, float, int, int, float]:
    """In a process of its own: records, seconds to index, bytes that this added, the peak, records a second."""
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
    return len(records), indexed, resident, peak_bytes(), len(places) / read


def peak_bytes() -> int:
    """The most that this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def source_rows(source: str, n: int) -> list[Result]:
    """Figures of one source."""
    written(source, 1)
    written(source, n)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        n_records, indexed, resident, peak, rate = alone.submit(_measure, source, n).result()
    name = f"{source}, {n_records:,} records"
    at_scale = n_records >= FULL.records
    bar = "≤ 1.5 GiB for 1 M records" if at_scale else "–"

    def met_by(n_bytes: int) -> bool | None:
        return n_bytes <= 1.5 * _GIB if at_scale else None

    def row(figure: str, value: float, unit: str, bar: str = "–", met: bool | None = None, n: int = 1) -> Result:
        return Result(f"{name}: {figure}", value, unit, bar, met, value, value, n, COMMAND)

    return [
        row("index in memory", resident / _GIB, "GiB resident above the bare process", bar, met_by(resident)),
        row("the whole process at its peak", peak / _GIB, "GiB resident", bar, met_by(peak)),
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

    def validation_loss(self, features: Any, records: Any) -> float:
        return 0.0


def training_row(source: str) -> Result:
    """A run from a source's sample files through two of the toy anchors."""
    with tempfile.TemporaryDirectory() as name:
        config = training_config(source, Path(name))
        assert train_run(config, resume=False)
        nll = [statistics.mean(step[f"nll/{anchor}"] for anchor in "AB") for step in read_metrics(config.run.dir)]
    assert len(nll) == TRAINED_STEPS
    first, last = (statistics.mean(part) for part in (nll[:_AT_AN_END], nll[-_AT_AN_END:]))
    figure = f"{source}, 50 steps from its sample files through two anchors: NLL"
    unit = f"nats a token, last {_AT_AN_END} steps; smallest – largest step"
    bar = f"below the first {_AT_AN_END} steps' {first:.3g}"
    return Result(figure, last, unit, bar, last < first, min(nll), max(nll), TRAINED_STEPS, COMMAND)


def training_config(source: str, folder: Path) -> Config:
    """The toy models A and B, which have seen words and shapes like those of the samples."""
    anchors = [{"name": name, "model": f"trainer/toy/models/{name}", "placement": "local"} for name in "AB"]
    return run_config(
        {"model": anchors[0]["model"], "latents": 9, "cpus": 1},
        anchors,
        run={"dir": str(folder / "run")},
        data={**SAMPLES[source](folder / "data", ("train", "val")), "questions_per_image": 2},
        loss={"ramp_steps": 10},
        logging={"tensorboard": False},
        train={
            "steps": TRAINED_STEPS,
            "batch_images": 2,
            "lr_lora": 5e-3,
            "lr_tokens": 5e-3,
            "checkpoint_every": TRAINED_STEPS,
            "validate_images": 4,
        },
    )


def waiting_config(folder: Path, n_tokens: int) -> Config:
    """Four one-megapixel JPEGs a step, through Qwen2.5-VL's image processor with room for so many visual tokens."""
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
    longest = n_tokens * _MERGED_PX**2
    Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * _MERGED_PX**2, "longest_edge": longest}).save_pretrained(model)
    METHODS["sleeping"] = SleepingMethod
    data = {"source": "jsonl", "path": str(folder), "questions_per_image": 1}
    return run_config({"model": model}, [], method="sleeping", data=data, train={"batch_images": 4})


def waiting_rows(n_steps: int, n_tokens: int, bar: float | None) -> list[Result]:
    """How long steps of 200 ms wait for their images; the first step, which nothing overlaps, is left out."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        config = waiting_config(Path(name), n_tokens)
        trainer = stack.enter_context(open_trainer(config, load_records(config.data, "train")))
        # The tower would run on the GPU; here it would take the cores that the loader needs.
        trainer.features.tokens = lambda images: None  # type: ignore[assignment,method-assign]
        metrics = [trainer.step(step) for step in range(n_steps + 1)][1:]
    shares = [100 * step["data_wait_ms"] / step["step_ms"] for step in metrics]
    share = sum(step["data_wait_ms"] for step in metrics) / sum(step["step_ms"] for step in metrics)
    figure = f"step of 200 ms, four JPEGs of 1 megapixel, at most {n_tokens} tokens each"
    words, met = ("–", None) if bar is None else (f"≤ {bar:g} %", 100 * share <= bar)
    return [
        Result(f"{figure}: data_wait_ms", 100 * share, "% of step_ms; smallest – largest step", words, met,
               min(shares), max(shares), n_steps, COMMAND),
        Result(f"{figure}: median step", statistics.median(step["step_ms"] for step in metrics), "ms", "–", None,
               min(step["step_ms"] for step in metrics), max(step["step_ms"] for step in metrics), n_steps, COMMAND),
    ]  # fmt: skip


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes; prints, records nothing")
    parser.add_argument("--only", choices=[*WRITERS, "training", "waiting"], help="measure one part")
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else FULL
    for part in [arguments.only] if arguments.only else ["training", *WRITERS, "waiting"]:
        if part == "training":
            rows = [training_row(source) for source in SAMPLES]
        elif part == "waiting":
            # The second is all of a megapixel.
            rows = [*waiting_rows(sizes.steps, 256, 2.0), *waiting_rows(sizes.steps, 1369, None)]
        else:
            rows = source_rows(part, sizes.records)
        for row in rows:
            print(f"{row.figure}: {row.value:.4g} {row.unit} (bar {row.bar}, met {row.met})", flush=True)
        if not arguments.tiny:
            record(rows)


if __name__ == "__main__":
    main()
