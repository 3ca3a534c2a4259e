"""The GPU benchmark's code runs on the CPU at a tiny size, and says what a machine without a GPU cannot say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.flops import decoder_size
from tests.benchmarks import anchor_path_gpu, results
from tests.benchmarks.anchor_path_gpu import NEEDS_GPU, PARTS, run_part
from tests.benchmarks.models import TINY, build_folder
from tests.benchmarks.read_flops import generator_flops
from tests.benchmarks.results import Result, record, record_unmeasured
from tests.benchmarks.runs import make_records, run_config
from trainer.generator import Generator

HERE = [name for name in PARTS if name not in ("memory", "sharing")]
"""Memory is counted by the GPU's allocator alone, sharing needs Ray (`tests/integration/test_bench_ray.py`)."""


@pytest.fixture
def results_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS_JSON", tmp_path / "results.json")
    monkeypatch.setattr(results, "RESULTS_MD", tmp_path / "RESULTS.md")
    return tmp_path


@pytest.mark.parametrize("name", HERE)
def test_every_part_runs_and_has_the_declared_figures(name: str) -> None:
    rows = run_part(PARTS[name], "cpu", tiny=True)
    assert [(row.figure, row.bar) for row in rows] == list(PARTS[name].figures)
    assert all(row.value is not None and row.value > 0 for row in rows)


def test_generator_pass_is_counted_as_it_is_computed(tmp_path: Path) -> None:
    folder = build_folder(TINY, tmp_path / "model")
    config = run_config({"model": str(folder)}, [{"name": "base", "model": "-", "placement": "shared_base"}])
    generator = Generator(config.generator, seed=0)
    records = make_records(tmp_path / "images", 2, (112, 84), 1)
    tokens = generator.image_tokens_from(generator.model.image_inputs([record.load_image() for record in records]))
    n_tokens = 15 + len(tokens.tokens[0]) + 1 + 1 + 16
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        torch.autograd.grad(generator.emit(tokens).sum(), generator.parameters())
    expected = generator_flops(decoder_size(generator.model.hf_model.config), 2, n_tokens, config.generator.lora.rank)
    assert counted.get_total_flops() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the figures can be measured")
def test_without_a_gpu_it_says_so_and_records_no_value(
    results_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["anchor_path_gpu"])
    anchor_path_gpu.main()
    assert NEEDS_GPU in capsys.readouterr().out
    stored = json.loads((results_files / "results.json").read_text())
    assert [entry["figure"] for entry in stored] == [figure for part in PARTS.values() for figure, _ in part.figures]
    assert all(entry["value"] is None and entry["met"] is None for entry in stored)
    assert "not measured" in (results_files / "RESULTS.md").read_text()


def test_an_unmeasured_figure_does_not_replace_a_measured_one(results_files: Path) -> None:
    record([Result("f", 2.0, "×", "≥ 1", True, 2.0, 2.0, 5, "c")])
    record_unmeasured([Result(name, None, "–", "≥ 1", None, None, None, 0, "c") for name in ("f", "g")])
    values = {entry["figure"]: entry["value"] for entry in json.loads((results_files / "results.json").read_text())}
    assert values == {"f": 2.0, "g": None}
