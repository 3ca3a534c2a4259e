"""The config: errors that name field, value and fix; overrides; and what imports what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import Config, dump_config, load_config, parse_config
from shared.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "deploy/configs").rglob("*.yaml"))

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "generator": {"model": "M"},
    "anchors": [{"name": "A", "model": "M"}],
    "data": {"path": "D"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    node: Any = tree
    *parents, leaf = path.split(".")
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[leaf] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.stepz", 3, "f.yaml: train.stepz: unknown key (value 3); correct its spelling or remove it"),
        ("anchors.0.weigth", 1, "f.yaml: anchors.0.weigth: unknown key (value 1); correct its spelling or remove it"),
        ("train.steps", "many", "f.yaml: train.steps: input should be a valid integer"),
        ("train.steps", "many", "got 'many'"),
        ("train.steps", 0, "f.yaml: train.steps: input should be greater than or equal to 1, got 0"),
        ("data.on_error", "ask", "f.yaml: data.on_error: input should be 'fail' or 'skip', got 'ask'"),
        ("anchors.0.name", "a b", "f.yaml: anchors.0.name: string should match pattern"),
        ("generator.dtype", "float64", "generator.dtype: float64 is for tests of anchors; use float32 or bfloat16"),
        ("train.microbatches", 3, "microbatches: 3 does not divide batch_images: 4; choose a divisor"),
        (
            "evaluation.unseen",
            [{"name": "C", "model": "M", "placement": "shared_base"}],
            "evaluation.unseen: an unseen anchor cannot be shared_base; use ray or local",
        ),
        (
            "evaluation.unseen",
            [{"name": "A", "model": "M"}],
            "anchors: the name 'A' is used twice; give every anchor a name of its own",
        ),
    ],
)
def test_errors_name_field_value_and_fix(path, value, expected):
    with pytest.raises(ConfigError) as raised:
        parse_config(changed(path, value), "f.yaml")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_errors_that_need_two_fields():
    tree = changed("pool.latent_positions", "grid")
    tree["generator"]["latents"] = 8
    with pytest.raises(ConfigError, match=r"needs a square generator\.latents, got 8; use 4 or latent_positions: text"):
        parse_config(tree, "f")
    tree = changed("anchors.0.replicas", 2)
    tree["anchors"][0]["placement"] = "local"
    with pytest.raises(ConfigError, match=r"anchors\.0: replicas: 2 with placement local; .* set replicas: 1"):
        parse_config(tree, "f")


def test_every_wrong_field_gets_a_line_and_absent_ones_are_named():
    with pytest.raises(ConfigError) as raised:
        parse_config({"run": {}, "generator": {"model": "M", "latents": -1}, "anchors": 3}, "f")
    lines = str(raised.value).splitlines()
    assert "f: run.dir: required but absent; add it" in lines
    assert "f: data: required but absent; add it" in lines
    assert any(line.startswith("f: generator.latents:") and line.endswith("got -1") for line in lines)
    assert any(line.startswith("f: anchors:") for line in lines)


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    overrides = ["train.steps=7", "anchors.0.replicas=2", "data.held_out_kinds=[count, exist]", "run.dir=here"]
    config = load_config(file, overrides)
    assert (config.train.steps, config.anchors[0].replicas) == (7, 2)
    assert config.data.held_out_kinds == ("count", "exist")
    assert config.run.dir == Path("here")
    for bad, message in {
        "train.steps": "write it as key=value",
        "anchors.5.replicas=2": "no field anchors.5.replicas; count list entries from 0",
        "anchors.A.replicas=2": "no field anchors.A.replicas",
        "run.dir.deeper=1": "no field run.dir.deeper",
        "train.steps=[": "not valid YAML",
        "train.stepz=3": "train.stepz: unknown key",
    }.items():
        with pytest.raises(ConfigError) as raised:
            load_config(file, [bad])
        assert message in str(raised.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="no such config; the shipped ones lie in deploy/configs"):
        load_config(tmp_path / "absent.yaml")
    file = tmp_path / "c.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_configs_parse_and_survive_a_round_trip(file, tmp_path):
    config = load_config(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(resolved) == config


def test_the_toy_config_is_shipped_and_a_config_cannot_be_changed():
    assert "toy.yaml" in [file.name for file in SHIPPED]
    config = Config.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("module", ["shared.config", "shared.messages"])
def test_light_modules_import_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("shared", {"trainer", "anchor_service", "ray"}), ("anchor_service", {"trainer"})],
)
def test_dependencies_point_one_way(package, forbidden):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not imported_packages(file) & forbidden, file


_STEP_WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from pathlib import Path
from shared.config import parse_config
from trainer.loop import train_run
from trainer.metrics import read_metrics
from trainer.toy.dataset import ensure_toy_data
model, root = sys.argv[1], Path(sys.argv[2])
ensure_toy_data(root / "data", {"train": 4, "val": 2}, seed=0)
config = parse_config({
    "run": {"dir": str(root / "run")},
    "generator": {"model": model, "latents": 4, "device": "cpu", "lora": {"rank": 2}},
    "anchors": [
        {"name": "A", "model": model, "placement": "local"},
        {"name": "S", "model": model, "placement": "shared_base"},
    ],
    "data": {"source": "toy", "path": str(root / "data")},
    "train": {"steps": 2, "batch_images": 2, "microbatches": 2, "validate_every": 2, "validate_images": 2},
    "logging": {"tensorboard": False},
}, "test")
assert train_run(config, resume=False)
print(len(read_metrics(config.run.dir)), "ray" in sys.modules and sys.modules["ray"] is not None)
"""


def test_training_with_local_placements_needs_no_ray(tiny_folder, tmp_path):
    command = [sys.executable, "-c", _STEP_WITHOUT_RAY, tiny_folder("qwen2_5_vl"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "2 False"


def test_a_file_over_its_base(tmp_path):
    """Mappings merge, everything else is replaced; the base may have a base, in another folder."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.yaml").write_text(yaml.safe_dump({**MINIMAL, "train": {"steps": 7, "seed": 3}}))
    (tmp_path / "b.yaml").write_text("base: below/a.yaml\ntrain: {steps: 8, betas: [0.5, 0.6]}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\ntrain: {batch_images: 2}\n")
    config = load_config(tmp_path / "c.yaml", ["train.steps=9"])
    assert (config.train.steps, config.train.seed, config.train.batch_images) == (9, 3, 2)
    assert config.train.betas == (0.5, 0.6)
    assert config.generator == load_config(tmp_path / "below" / "a.yaml").generator


def test_a_base_that_leads_back_or_nowhere_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: base: .*a\.yaml leads back to itself"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: gone.yaml")
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config"):
        load_config(tmp_path / "a.yaml")
