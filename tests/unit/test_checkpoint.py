"""Checkpoints: whole or absent, the newest n and the best kept, damage noticed, state restored bit for bit."""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from shared.config import GeneratorConfig
from shared.errors import CheckpointError
from shared.run_folder import digest
from shared.vlm.generator import Generator
from trainer.checkpoint import CheckpointStore, load_trainer_state


@pytest.fixture(scope="module")
def generator(tiny_folder) -> Generator:
    return Generator(GeneratorConfig(model=tiny_folder("llava"), latents=2, device="cpu", lora={"rank": 2}), seed=0)


def save(store: CheckpointStore, generator: Generator, step: int, loss: float | None = None, **state) -> Path:
    return store.save(step, generator, {"next_step": step, **state}, "a: 1\n", "# card\n", loss)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_is_a_peft_folder_with_state(tmp_path, generator):
    folder = save(CheckpointStore(tmp_path, 2), generator, 7, 0.5, note=torch.arange(3))
    assert folder == tmp_path / "checkpoints/step-000007"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "config.yaml", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    newest = CheckpointStore(tmp_path, 2).newest()
    assert (newest.folder, newest.step, newest.validation_loss) == (folder, 7, 0.5)
    state = load_trainer_state(newest)
    assert state["next_step"] == 7
    assert state["note"].tolist() == [0, 1, 2]
    assert names(tmp_path) == ["best", "step-000007"]


def test_the_newest_n_and_the_best_are_kept(tmp_path, generator):
    store = CheckpointStore(tmp_path, keep=2)
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5), (4, None), (5, 0.4)):
        save(store, generator, step, loss)
    assert names(tmp_path) == ["best", "step-000002", "step-000004", "step-000005"]
    assert store.best().step == 2
    assert store.newest().step == 5
    save(store, generator, 6, 0.2)
    assert names(tmp_path) == ["best", "step-000005", "step-000006"]
    assert store.best().step == 6


def test_without_validation_the_newest_is_best(tmp_path, generator):
    store = CheckpointStore(tmp_path, keep=3)
    assert store.newest() is None
    assert store.best() is None
    save(store, generator, 1)
    save(store, generator, 2)
    assert store.best().step == 2


def flip_a_byte(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_state(folder: Path) -> None:
    file = folder / "trainer_state.pt"
    file.write_bytes(file.read_bytes()[:100])


def remove_a_file(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [flip_a_byte, cut_state, remove_a_file, break_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, generator, caplog, damage):
    store = CheckpointStore(tmp_path, keep=3)
    save(store, generator, 1, 0.5)
    folder = save(store, generator, 2, 0.1)
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert store.newest().step == 1
        assert "step-000002" in caplog.text
        assert "damaged" in caplog.text
        assert store.best().step == 1


def test_a_write_that_was_killed_is_no_checkpoint(tmp_path, generator):
    store = CheckpointStore(tmp_path, keep=3)
    save(store, generator, 1)
    partial = tmp_path / "checkpoints/.step-000002.partial"
    partial.mkdir()
    (partial / "adapter_model.safetensors").write_bytes(b"half")
    assert store.newest().step == 1
    save(store, generator, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@contextlib.contextmanager
def file_size_limit(n_bytes: int):
    """Writing beyond this fails in the kernel, as on a full disk, whoever writes: Python, torch, Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails_at", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "state"])
def test_a_failing_disk_leaves_earlier_checkpoints_whole(tmp_path, tiny_folder, fails_at):
    config = GeneratorConfig(model=tiny_folder("llava"), latents=2, device="cpu", lora={"rank": 2})
    generator = Generator(config, seed=0)
    if fails_at == "tokenizer.json":
        generator.model.processor.tokenizer.add_tokens([f"word{i}" for i in range(500)])
    store = CheckpointStore(tmp_path, keep=1)
    save(store, generator, 1, 0.5)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints/step-000001").iterdir()}
    limit_bytes = {"adapter_config.json": 100, "adapter_model.safetensors": 8_000}.get(fails_at, 20_000)
    with (
        file_size_limit(limit_bytes),
        pytest.raises(CheckpointError, match=r"step-000002: checkpoint not written .*; free disk space and resume"),
    ):
        save(store, generator, 2, 0.1, note=torch.zeros(10_000))
    assert names(tmp_path) == ["best", "step-000001"]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert store.best().step == store.newest().step == 1
    save(store, generator, 2, 0.1)
    assert names(tmp_path) == ["best", "step-000002"]


def test_the_optimizer_goes_on_bit_for_bit(tmp_path, generator):
    """Three steps, then a restore into new objects; the next steps give the same weights, bit for bit."""

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))

    def steps(model, optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()

    model, optimizer = fresh()
    steps(model, optimizer, 3)
    store = CheckpointStore(tmp_path, keep=1)
    save(
        store, generator, 3,
        optimizer=optimizer.state_dict(), extra_modules=model.state_dict(), cpu_rng=torch.get_rng_state(),
    )  # fmt: skip
    steps(model, optimizer, 2)

    other, other_optimizer = fresh()
    state = load_trainer_state(store.newest())
    other.load_state_dict(state["extra_modules"])
    other_optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_rng"])
    steps(other, other_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_plain_values_are_unpickled(tmp_path, generator):
    store = CheckpointStore(tmp_path, keep=1)
    folder = save(store, generator, 1)
    torch.save({"hook": builtins.print}, folder / "trainer_state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer_state.pt"] = digest(folder / "trainer_state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_trainer_state(store.newest())
