"""The feature cache: it gives back what was put in, or nothing; and no run's numbers depend on it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from anchor_service.pool import AnchorPool
from shared.config import Config, FeatureCacheConfig, GeneratorConfig, parse_config
from shared.errors import ConfigError, DataError
from shared.vlm import ImageTokens, VisionLanguageModel, load_vlm
from shared.vlm.generator import Generator
from tests.tiny_models import FAMILY_NAMES
from trainer.data import load_records, training_records
from trainer.data.feature_cache import FeatureCache, join_images, split_images, tower_revision
from trainer.data.records import ImageFile, Record
from trainer.data.sampling import Sampler
from trainer.evaluation.reading import latents_of
from trainer.image_features import ImageFeatures
from trainer.loop import Trainer
from trainer.toy.dataset import ensure_toy_data

GIB = 2**30
ROOMY = 1.0


def open_cache(folder: Path, max_gib: float = ROOMY, revision: bytes = b"r") -> FeatureCache:
    return FeatureCache(FeatureCacheConfig(path=folder, max_gib=max_gib), revision)


def store(cache: FeatureCache, images: dict[str, ImageTokens]) -> None:
    cache.write(images)
    cache.close()


def one_image(seed: int, n_tokens: int = 64) -> ImageTokens:
    return ImageTokens([torch.randn(n_tokens, 8, generator=torch.Generator().manual_seed(seed))], [(8, n_tokens // 8)])


def same_bits(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return [t.dtype for t in one] == [t.dtype for t in two] and all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
@torch.no_grad()
def test_entries_come_back_bit_for_bit(tiny_model, pictures, tmp_path, family, dtype):
    tokens = tiny_model(family, dtype).image_tokens(pictures)
    cache = open_cache(tmp_path)
    keys = [cache.key(name) for name in (b"0", b"1", b"2")]
    assert [cache.read(key) for key in keys] == [None] * 3
    store(cache, dict(zip(keys, split_images(tokens), strict=True)))
    found = join_images([open_cache(tmp_path).read(key) for key in keys])
    assert found.tokens[0].dtype is {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert same_bits(found.tokens, tokens.tokens)
    assert same_bits(found.deepstack, tokens.deepstack)
    assert len(found.deepstack) == (2 if family == "qwen3_vl" else 0)
    assert found.grids == tokens.grids
    assert (found.grids[0] is None) == (family == "llava")


def test_another_image_or_revision_misses(tmp_path):
    cache = open_cache(tmp_path)
    store(cache, {cache.key(b"image"): one_image(0)})
    for revision, image, is_found in ((b"r", b"image", True), (b"r", b"imagE", False), (b"s", b"image", False)):
        other = open_cache(tmp_path, revision=revision)
        assert (other.read(other.key(image)) is not None) == is_found


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_revision_is_that_of_tower_and_image_processor(tiny_folder, family):
    folder = tiny_folder(family, vocabulary=None)
    model = load_vlm(folder)
    revision = tower_revision(model)
    generator = Generator(GeneratorConfig(model=folder, latents=5, device="cpu"), seed=1)
    assert tower_revision(generator.model) == revision, "adapter and latent tokens are no part of the tower"
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight += 1.0
    assert tower_revision(model) == revision

    for name, parameter in model.inner.named_parameters():
        if not name.startswith(f"{model.family.decoder}."):
            with torch.no_grad():
                before = parameter.clone()
                parameter.view(-1)[-1] += 1.0
                assert tower_revision(model) != revision, name
                parameter.copy_(before)
    model.processor.image_processor.image_mean = [0.25, 0.5, 0.5]
    assert tower_revision(model) != revision
    assert tower_revision(load_vlm(folder)) == revision
    assert tower_revision(load_vlm(folder, "bfloat16")) != revision


def test_what_was_used_longest_ago_goes_first(tmp_path):
    """Room for 64 entries: the cache never holds more, and one that is read time and again stays."""
    cache = open_cache(tmp_path / "measure")
    store(cache, {"k": one_image(0)})
    n_bytes = (tmp_path / "measure/k.features").stat().st_size
    (tmp_path / "notes.txt").write_text("not the cache's")
    cache = open_cache(tmp_path, max_gib=64 * n_bytes / GIB)
    for i in range(100):
        cache.write({f"k{i:02d}": one_image(i)})
        cache._wait()
        assert cache.read("k00") is not None
        assert sum(path.stat().st_size for path in tmp_path.glob("*.features")) <= 64 * n_bytes
    cache.close()
    kept = sorted(path.stem for path in tmp_path.glob("*.features"))
    assert kept == ["k00", *(f"k{i}" for i in range(101 - len(kept), 100))]
    assert 58 <= len(kept) <= 64
    assert (tmp_path / "notes.txt").exists()

    open_cache(tmp_path, max_gib=16 * n_bytes / GIB)
    assert [path.stem for path in sorted(tmp_path.glob("*.features"))] == ["k00", *(f"k{i}" for i in range(86, 100))]


def test_what_a_killed_writer_left_is_dropped_after_an_hour(tmp_path):
    old, new = tmp_path / "a.1.partial", tmp_path / "b.1.partial"
    for file, age_s in ((old, 4000), (new, 10)):
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age_s,) * 2)
    open_cache(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def flipped(at: int):
    def damage(content: bytes) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


DAMAGES = {
    "digest": flipped(5),
    "header length": flipped(33),
    "header": flipped(50),
    "data": lambda content: flipped(len(content) - 3)(content),
    "cut short": lambda content: content[:-100],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_named_once_and_replaced(tmp_path, caplog, damage):
    cache = open_cache(tmp_path)
    store(cache, {"k": one_image(0)})
    file = tmp_path / "k.features"
    file.write_bytes(damage(file.read_bytes()))
    cache = open_cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert cache.read("k") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: the cached features are damaged; they are computed again"
    ]
    store(cache, {"k": one_image(0)})
    assert same_bits(open_cache(tmp_path).read("k").tokens, one_image(0).tokens)


def test_an_entry_under_another_key_is_damaged(tmp_path):
    store(open_cache(tmp_path), {"k": one_image(0)})
    shutil.copy(tmp_path / "k.features", tmp_path / "j.features")
    assert open_cache(tmp_path).read("j") is None


def test_a_failing_disk_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.feature_cache\.path: .*/file cannot be used"):
        open_cache(tmp_path / "file")
    cache = open_cache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            cache.write({f"k{i}": one_image(i)})
        cache.close()
    assert [record.getMessage().split(": ")[1].split(" (")[0] for record in caplog.records] == [
        "features cannot be cached"
    ]


def write_for_ever(folder: Path, max_gib: float) -> None:
    cache = open_cache(folder, max_gib)
    while True:
        cache.write({f"k{i:03d}": one_image(i) for i in range(20)})
        cache._wait()


def test_concurrent_and_killed_writers_leave_whole_entries_alone(tmp_path, caplog):
    """Three processes write and evict the same keys, while this one reads; then they are killed."""
    max_gib = 64 * 2500 / GIB
    writers = [
        multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path, max_gib)) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    reader, n_found, deadline = open_cache(tmp_path, max_gib), 0, time.monotonic() + 60
    try:
        while n_found < 300 and time.monotonic() < deadline:
            for i in range(20):
                found = reader.read(f"k{i:03d}")
                assert found is None or same_bits(found.tokens, one_image(i).tokens)
                n_found += found is not None
        assert all(writer.is_alive() for writer in writers)
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    assert n_found >= 300
    for file in tmp_path.glob("*.features"):
        assert reader.read(file.stem) is not None
    assert not caplog.records


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    ensure_toy_data(folder, {"train": 8, "val": 3}, seed=0)
    return folder


def config_of(model: str, data: Path, cache: Path | None) -> Config:
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": model, "latents": 4, "device": "cpu", "lora": {"rank": 2}},
        "anchors": [{"name": "S", "model": model, "placement": "shared_base"}],
        "data": {"source": "toy", "path": str(data), "feature_cache": cache and {"path": str(cache), "max_gib": ROOMY}},
        "train": {"steps": 6, "batch_images": 4, "microbatches": 2, "lr_lora": 5e-3},
    }
    return parse_config(tree, "test")


class TowerUsedError(AssertionError):
    pass


@contextlib.contextmanager
def without_images_or_tower(monkeypatch):
    """Decoding, image processor and tower raise while the context lasts."""

    def refuse(*_args, **_options):
        raise TowerUsedError

    with monkeypatch.context() as patch:
        patch.setattr(Record, "load_images", refuse)
        patch.setattr(VisionLanguageModel, "image_inputs", refuse)
        patch.setattr(VisionLanguageModel, "image_tokens_from", refuse)
        yield


def train(config: Config, context=contextlib.nullcontext) -> list[dict[str, float]]:
    """Three epochs, each with other neighbours in a batch; metrics of every step."""
    generator = Generator(config.generator, config.train.seed)
    records = training_records(config.data, config.train.seed)
    sampler = Sampler(records, config.train.batch_images, 2, config.train.seed)
    probe = [record.images[0].read() for record in records[:2]]
    shared_base = (generator.model, generator.adapter_off)
    with (
        AnchorPool.start(config, generator.handshake(), shared_base, probe_images=probe) as pool,
        contextlib.closing(Trainer(config, generator, pool, sampler)) as trainer,
        context(),
    ):
        generator.train()
        return [trainer.step(step) for step in range(config.train.steps)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_losses_are_bit_identical_with_a_cold_a_warm_and_no_cache(tiny_folder, toy_data, tmp_path, monkeypatch, family):
    model = tiny_folder(family)
    none = train(config_of(model, toy_data, None))
    config = config_of(model, toy_data, tmp_path)
    cold = train(config)
    warm = train(config, lambda: without_images_or_tower(monkeypatch))
    with pytest.raises(TowerUsedError):
        train(config_of(model, toy_data, None), lambda: without_images_or_tower(monkeypatch))

    names = ("loss", "nll", "concept", "norm", "nll/S", "grad_norm")
    numbers = [[[step[name] for name in names] for step in run] for run in (none, cold, warm)]
    assert numbers[0] == numbers[1] == numbers[2]
    assert len({step["loss"] for step in none}) == len(none)
    # The loader looks one step ahead, so the second epoch may begin before the first is stored.
    assert [cold[step]["feature_cache_hits"] for step in (0, 1, 4, 5)] == [0.0, 0.0, 1.0, 1.0]
    assert [step["feature_cache_hits"] for step in warm] == [1.0] * 6
    assert "feature_cache_hits" not in none[0]


def test_a_batch_with_a_miss_is_computed_as_a_whole_and_completed(tiny_folder, toy_data, tmp_path, monkeypatch):
    config = config_of(tiny_folder("qwen3_vl"), toy_data, tmp_path)
    records = load_records(config.data, "val")
    generator = Generator(config.generator, 0)
    with contextlib.closing(ImageFeatures(generator, None)) as uncached:
        expected_BKD = latents_of(generator, uncached, records, 3)
    for n_missing in (3, 1, 0):
        for file in sorted(tmp_path.glob("*.features"))[:n_missing]:
            file.unlink()
        with contextlib.closing(ImageFeatures(generator, config.data.feature_cache)) as features:
            prepared = features.prepare([features.open(record) for record in records])
            assert features.metrics([prepared]) == {"feature_cache_hits": pytest.approx(1 - n_missing / 3)}
            assert len(prepared.missing) == n_missing
            assert torch.equal(latents_of(generator, features, records, 3), expected_BKD)
        assert len(list(tmp_path.glob("*.features"))) == 3
    with (
        contextlib.closing(ImageFeatures(generator, config.data.feature_cache)) as features,
        without_images_or_tower(monkeypatch),
    ):
        assert torch.equal(latents_of(generator, features, records, 3), expected_BKD)


def test_an_image_that_changes_on_disk_is_computed_again_and_a_damaged_one_is_named(tiny_folder, toy_data, tmp_path):
    config = config_of(tiny_folder("qwen2_5_vl"), toy_data, tmp_path / "cache")
    generator = Generator(config.generator, 0)
    file = tmp_path / "image.png"
    record = Record("r", "clevr", (ImageFile(file),), ())

    def tokens_of(features: ImageFeatures) -> Tensor:
        return features.tokens(features.prepare([features.open(record)])).tokens[0]

    with contextlib.closing(ImageFeatures(generator, config.data.feature_cache)) as features:
        seen = []
        for color in ("red", "blue", "red"):
            Image.new("RGB", (48, 48), color).save(file)
            seen.append(tokens_of(features))
        assert not torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], seen[2])
        for content in (b"no image", None):
            file.write_bytes(content) if content else file.unlink()
            with pytest.raises(DataError, match=r"image\.png: image of record r cannot be read .*on_error: skip"):
                features.open(record)
