"""The GPU benchmark's code runs on the CPU at a tiny size, and says what a machine without a GPU cannot say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import AnchorCallError
from shared.flops import decoder_size
from shared.vlm.generator import Generator
from tests.benchmarks import anchor_path_gpu, results
from tests.benchmarks.anchor_path_gpu import NEEDS_GPU, PARTS, Part, run_part
from tests.benchmarks.bench import Bench
from tests.benchmarks.models import TINY, build_folder
from tests.benchmarks.read_flops import generator_flops
from tests.benchmarks.results import Result, record, record_unmeasured
from tests.benchmarks.runs import make_records, run_config
from trainer.image_features import ImageFeatures

HERE = [name for name in PARTS if name != "sharing"]
"""Sharing needs Ray: `tests/integration/test_bench_ray.py`."""


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
    tokens = ImageFeatures(generator, None).of_records(records)
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


def test_too_small_a_card_leaves_the_figures_without_values() -> None:
    def too_large(bench: Bench) -> list[Result]:
        raise AnchorCallError("anchor A: out of memory") from torch.OutOfMemoryError()

    def broken(bench: Bench) -> list[Result]:
        raise AnchorCallError("anchor A: no gradient")

    (row,) = run_part(Part(too_large, (("f", "≥ 1"),)), "cpu", tiny=True)
    assert (row.figure, row.value, row.bar, row.met) == ("f", None, "≥ 1", None)
    with pytest.raises(AnchorCallError, match="no gradient"):
        run_part(Part(broken, ()), "cpu", tiny=True)


def test_a_picture_stands_below_its_commands_table(results_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = results_files / "growth.png"
    monkeypatch.setattr(results, "_PICTURES", {"c": (picture, "what it shows")})
    entries = [asdict(Result("f", 2.0, "×", "–", None, 2.0, 2.0, 5, command)) for command in ("c", "d")]
    assert "growth.png" not in results.render(entries)
    picture.touch()
    first, second = results.render(entries).split("## `d`")
    assert "![what it shows](growth.png)" in first
    assert "growth.png" not in second


def test_an_unmeasured_figure_does_not_replace_a_measured_one(results_files: Path) -> None:
    record([Result("f", 2.0, "×", "≥ 1", True, 2.0, 2.0, 5, "c")])
    record_unmeasured([Result(name, None, "–", "≥ 1", None, None, None, 0, "c") for name in ("f", "g")])
    values = {entry["figure"]: entry["value"] for entry in json.loads((results_files / "results.json").read_text())}
    assert values == {"f": 2.0, "g": None}
