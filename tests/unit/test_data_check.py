"""`data check` against plain counts on data with known faults; `data show` against the token ids that models get."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from shared.config import parse_config
from shared.packing import Branch
from shared.vlm import load_vlm
from shared.vlm.generator import Generator
from tests.data_samples import picture, png
from tests.integration.helpers import training_tree, write_config
from trainer.cli import app
from trainer.data import load_records
from trainer.data.check import Seen, check_data, examples, seen_by_tower
from trainer.data.show import anchor_prompt, generator_prompt, show_data
from trainer.report.data_page import print_check, write_page


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Two splits with a shared image, a broken one, a damaged line; the third is absent."""
    root = tmp_path / "faulty"
    (root / "i").mkdir(parents=True)
    for n in range(6):
        picture(n, (48 + 16 * (n % 2), 48)).save(root / f"i/{n}.png")
    (root / "i/copy.png").write_bytes((root / "i/0.png").read_bytes())
    (root / "i/broken.png").write_bytes(png(1)[:120])
    names = {"train": ["0", "1", "2", "3", "broken"], "val": ["copy", "4", "5"]}
    answers = {"train": ["yes", "yes", "no", "yes", "no"], "val": ["no", "no", "yes"]}
    for split, images in names.items():
        lines = [
            json.dumps(
                {
                    "image": f"i/{name}.png",
                    "questions": [
                        {"question": "is there a red circle?", "answer": answer, "kind": "exist"},
                        {"question": "how many things are there?", "answer": str(n % 3), "kind": "count"},
                    ],
                }
            )
            for n, (name, answer) in enumerate(zip(images, answers[split], strict=True))
        ]
        (root / f"{split}.jsonl").write_text("\n".join([*lines, "{"]))
    return root


def config_of(toy_folder: Path, root: Path) -> Any:
    tree = training_tree(toy_folder, root / "run")
    tree["data"] = {"source": "jsonl", "path": str(root), "on_error": "fail"}
    return parse_config(tree, "test")


def test_every_figure_of_a_faulty_data_set(toy_folder: Path, faulty: Path, tmp_path: Path) -> None:
    check = check_data(config_of(toy_folder, faulty), 0, tmp_path / "cache.jsonl")
    train, val = check.splits
    assert list(check.absent) == ["test"]
    assert (len(train.records), len(val.records)) == (5, 3)
    assert [train.damaged.count, val.damaged.count, train.broken.count, val.broken.count] == [1, 1, 1, 0]
    assert "train.jsonl: line 6" in train.damaged.messages[0]
    assert "broken.png: image of record train/5 cannot be decoded" in train.broken.messages[0]
    assert check.shared == {("train", "val"): 1}
    assert train.images.sizes == Counter({(48, 48): 2, (64, 48): 2})
    assert train.images.file_bytes == sum((faulty / f"i/{n}.png").stat().st_size for n in range(4))
    # exist: yes 3 of 5; count: 0 or 1, 2 of 5 each
    assert train.prior == pytest.approx((3 + 2) / 10)
    assert val.prior == pytest.approx((2 + 1) / 6)
    assert not train.silent


def test_the_check_goes_on_from_what_it_learnt(toy_folder: Path, faulty: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep/cache.jsonl"
    config = config_of(toy_folder, faulty)
    first = check_data(config, 0, cache)
    lines = cache.read_text().splitlines()
    assert len(lines) == 7  # six pictures, one of them twice, and the broken one
    cache.write_text("\n".join([*lines[:3], lines[3][:20]]) + "\n")  # killed while it wrote
    again = check_data(config, 0, cache)
    assert [s.images for s in again.splits] == [s.images for s in first.splits]
    known = [json.loads(line) for line in lines]
    cache.write_text("".join(json.dumps([digest, [7, 5]]) + "\n" for digest, _ in known))
    assert set(check_data(config, 0, cache).splits[0].images.sizes) == {(7, 5)}, "known images are not decoded again"


def test_some_images_are_opened_evenly_spread(toy_folder: Path, faulty: Path, tmp_path: Path) -> None:
    check = check_data(config_of(toy_folder, faulty), 2, tmp_path / "cache.jsonl")
    assert check.splits[0].images.looked_at + check.splits[0].broken.count == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_tokens_of_a_size_are_those_of_the_tower(family: str, tiny_folder: Any, tiny_model: Any) -> None:
    sizes = [(48, 48), (64, 32), (37, 60)]
    model = tiny_model(family)
    tokens = model.image_tokens([Image.new("RGB", size) for size in sizes]).tokens
    inputs = [model.image_inputs([Image.new("RGB", size)])["pixel_values"].nbytes for size in sizes]
    expected = {s: Seen(len(t), n) for s, t, n in zip(sizes, tokens, inputs, strict=True)}
    assert seen_by_tower(tiny_folder(family), set(sizes)) == expected


def test_answers_without_tokens_are_counted(toy_folder: Path, faulty: Path, tmp_path: Path) -> None:
    line = {"image": "i/0.png", "question": "is there a red circle?", "answer": "\u2028zebra"}
    (faulty / "train.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "answer": "\u200b"}))
    (split, _) = check_data(config_of(toy_folder, faulty), 0, tmp_path / "cache.jsonl").splits
    prompt = load_vlm(str(toy_folder / "A")).prompt
    ids = prompt.tokenizer("\u200b", add_special_tokens=False)["input_ids"]
    assert ("\u200b" in split.silent) == (not ids)


def test_page_and_table_name_every_fault(toy_folder: Path, faulty: Path, tmp_path: Path) -> None:
    check = check_data(config_of(toy_folder, faulty), 0, tmp_path / "cache.jsonl")
    console = Console(file=io.StringIO(), width=200)
    print_check(check, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    page = write_page(check, tmp_path / "page").read_text()
    for expected in (
        "1 image stands in both train and val",
        "broken.png: image of record train/5 cannot be decoded",
        "line 6: no valid JSON",
        "split test cannot be read",
    ):
        assert expected in printed
        assert expected in page
    assert "The image of this record is no longer where it was" in page
    assert "<script" not in page
    assert "50.0 %" in printed


def test_examples_are_of_every_kind(toy_folder: Path, faulty: Path) -> None:
    records = load_records(config_of(toy_folder, faulty).data.model_copy(update={"on_error": "skip"}), "train")
    assert {q.kind for record in examples(records, 2) for q in record.questions} == {"count", "exist"}
    assert [r.record_id for r in examples(records, 4)] == [r.record_id for r in examples(records, 4)]


def test_prompts_are_those_that_the_models_get(toy_folder: Path) -> None:
    config = parse_config(training_tree(toy_folder, toy_folder / "run"), "test")
    generator = Generator(config.generator, 0)
    prompt = generator.model.prompt
    tokenizer = prompt.tokenizer
    record = load_records(config.data, "train")[0]
    shown = generator_prompt(prompt, [9, 4], config.generator.latents).plain
    ids = [*prompt.prefix_ids, *prompt.between_images_ids, *prompt.after_image_ids, *generator.token_ids]
    for token in tokenizer.convert_ids_to_tokens(ids):
        if not token.startswith("<|latent_") or token in ("<|latent_start|>", "<|latent_end|>"):
            assert token in shown
    assert "[9 image tokens]" in shown
    assert shown.index("[9 image tokens]") < shown.index("[4 image tokens]") < shown.index("[9 latents]")
    read = anchor_prompt(prompt, record, 0, 9)
    ((branch,),) = prompt.branches([[record.questions[0].message]])
    assert isinstance(branch, Branch)
    answer = [span for span in read.spans if "green" in str(span.style)]
    assert read.plain[answer[0].start :] == tokenizer.decode(list(branch.token_ids[branch.answer_start :]))


def test_show_prints_records_with_their_images(toy_folder: Path) -> None:
    config = parse_config(training_tree(toy_folder, toy_folder / "run"), "test")
    console = Console(file=io.StringIO(), width=200)
    show_data(config, "val", 2, 0, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("48×48") == 2
    assert printed.count("generator: ") == 2
    assert "anchor A, B; " in printed  # the toy models share a tokenizer
    assert "anchor A; " not in printed


def test_the_commands(toy_folder: Path, tmp_path: Path) -> None:
    config = write_config(training_tree(toy_folder, tmp_path / "run"), tmp_path / "config.yaml")
    checked = CliRunner().invoke(app, ["data", "check", "-c", str(config), "--to", str(tmp_path / "to")])
    assert checked.exit_code == 0, checked.output
    assert (tmp_path / "to/data.html").is_file()
    shown = CliRunner().invoke(app, ["data", "show", "-c", str(config), "--n", "1", "--split", "test"])
    assert shown.exit_code == 0, shown.output
    assert "test/CLEVR_test_" in shown.output


def test_the_index_says_what_it_weighs(toy_folder: Path) -> None:
    config = parse_config(training_tree(toy_folder, toy_folder / "run"), "test")
    records = load_records(config.data, "train")
    n_questions = records.kinds().total()
    assert 21 * n_questions <= records.index_bytes <= 21 * n_questions + 100 * len(records) + 1000
    assert np.isfinite(records.index_bytes)
