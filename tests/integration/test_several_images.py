"""Records of several images take the whole way: cache, generator, anchors, evaluation, benchmarks."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from anchor_service.pool import AnchorPool
from shared.config import Config, FeatureCacheConfig, parse_config
from shared.vlm import load_vlm
from shared.vlm.generator import Generator
from tests.integration.helpers import training_tree
from tests.reference import plain_read_images
from trainer.data.clevr import load_clevr
from trainer.data.records import Record
from trainer.data.sampling import Sampler
from trainer.evaluation.benchmarks.reading import read_benchmark
from trainer.evaluation.pgd import adversarial_latents
from trainer.evaluation.reading import Reader, latents_of
from trainer.image_features import ImageFeatures
from trainer.loop import Trainer


def config_of(toy: Path, run_dir: Path) -> Config:
    return parse_config(training_tree(toy, run_dir, train={"steps": 3}), "test")


def groups(toy: Path, split: str) -> list[Record]:
    """Records of one, two and three images, with the questions of the first."""
    single = load_clevr(toy / "data", split)
    found, start = [], 0
    for size in (1, 2, 3) * 2:
        images = tuple(image for record in single[start : start + size] for image in record.images)
        found.append(replace(single[start], images=images))
        start += size if start + 2 * size < len(single) else 0
    return found


def test_training_steps_and_evaluation(toy_folder: Path, tmp_path: Path) -> None:
    config = config_of(toy_folder, tmp_path / "run")
    records = groups(toy_folder, "train")
    generator = Generator(config.generator, seed=0)
    probe = records[1].image_bytes()
    with AnchorPool.start(config, generator.handshake(), probe_images=probe) as pool:
        with contextlib.closing(Trainer(config, generator, pool, Sampler(records, 4, 2, seed=0))) as trainer:
            trainer.method.prepare(trainer.features, records)
            metrics = [trainer.step(step) for step in range(config.train.steps)]
        assert all(np.isfinite(values["loss"]) for values in metrics)
        readings = []
        for n in (4, 1):
            latents_BKD = latents_of(generator, ImageFeatures(generator, None), records, n)
            reader = Reader(pool, records, with_batches_of(config, n))
            readings.append((reader.images(), reader.latents(latents_BKD)))
        attacked_BKD = adversarial_latents(generator, pool, records, 4)
        assert attacked_BKD.shape == (len(records), 9, generator.model.width)
    for one, other in zip(*readings, strict=True):
        for name in ("A", "B"):
            np.testing.assert_allclose(one[name].nll_N, other[name].nll_N, rtol=1e-4)
    assert_ceiling_is_the_ordinary_forward(toy_folder / "A", records, readings[0][0]["A"].nll_N)


def with_batches_of(config: Config, n: int) -> Config:
    evaluation = config.evaluation.model_copy(update={"batch_images": n})
    return config.model_copy(update={"evaluation": evaluation})


@torch.no_grad()
def assert_ceiling_is_the_ordinary_forward(folder: Path, records: list[Record], nll_N: np.ndarray) -> None:
    model = load_vlm(str(folder)).freeze()
    expected = []
    for record in records:
        images = record.load_images()
        counts = [len(tokens) for tokens in model.image_tokens(images).tokens]
        expected += [-plain_read_images(model, images, counts, q.message).mean().item() for q in record.questions]
    np.testing.assert_allclose(nll_N, expected, rtol=1e-4)


def test_cached_features_change_no_number(toy_folder: Path, tmp_path: Path) -> None:
    config = config_of(toy_folder, tmp_path / "run")
    generator = Generator(config.generator, seed=0)
    records = groups(toy_folder, "val")
    expected_BKD = latents_of(generator, ImageFeatures(generator, None), records, 3)
    for hits in (False, True):
        with contextlib.closing(
            ImageFeatures(generator, FeatureCacheConfig(path=tmp_path / "cache", max_gib=1))
        ) as features:
            opened = [features.open(record) for record in records]
            assert (features.prepare(opened).features is not None) == hits
            assert torch.equal(latents_of(generator, features, records, 3), expected_BKD)
    assert len(list((tmp_path / "cache").glob("*.features"))) == len({d for r in records for d in r.image_bytes()})


def test_a_benchmark_with_several_images(toy_folder: Path, tmp_path: Path) -> None:
    config = config_of(toy_folder, tmp_path / "run")
    records = groups(toy_folder, "test")
    rows = []
    for n, record in enumerate(records):
        row = {"idx": f"val_Jigsaw_{n}", "question": "is there a circle?", "choices": ["yes", "no"], "answer": "(A)"}
        data = [{"bytes": content, "path": None} for content in record.image_bytes()]
        rows.append(row | {f"image_{i}": cell for i, cell in enumerate([*data, None, None, None][:4], 1)})
    (tmp_path / "blink" / "Jigsaw").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "blink" / "Jigsaw" / "val-0.parquet")
    generator = Generator(config.generator, seed=0)
    with AnchorPool.start(config, generator.handshake()) as pool:
        section = read_benchmark("blink", tmp_path / "blink", generator, pool, batch_images=4)
    assert section["left_out"] == 0
    assert section["anchors"]["A"]["ceiling"]["n"] == len(records)
