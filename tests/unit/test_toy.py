"""The toy world: answers, balance, files, pictures, words, and models that learn from them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from shared.errors import DataError
from shared.vlm import load_vlm
from trainer.data.clevr import load_clevr
from trainer.toy.build import Stage, caption, fit
from trainer.toy.dataset import choose_questions, ensure_toy_data
from trainer.toy.questions import KINDS, all_questions
from trainer.toy.tiny_vlms import new_model, save_folder, toy_tokenizer
from trainer.toy.world import CELL_PX, COLORS, COLUMNS, GRID, IMAGE_PX, ROWS, SHAPES, render, sample_scene

ROOT = Path(__file__).parents[2]
COLOR, SHAPE = f"(?P<color>{'|'.join(COLORS)})", f"(?P<shape>{'|'.join(SHAPES)})"
THING = rf"(?:{COLOR} )?(?:{SHAPE}|thing)s?"
RELATION = r"(?P<relation>left of|right of|above|below)"


def scenes(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(n)]


def things(scene, phrase: str) -> list:
    """Objects that a phrase such as 'red squares' or 'things in the top row' may mean."""
    match = re.fullmatch(rf"{THING}(?: in the (?P<line>\w+) (?P<axis>row|column))?", phrase)
    assert match, phrase
    found = []
    for o in scene.objects:
        fits = match["color"] in (None, o.color) and match["shape"] in (None, o.shape)
        if match["line"]:
            fits &= (ROWS[o.row] if match["axis"] == "row" else COLUMNS[o.column]) == match["line"]
        if fits:
            found.append(o)
    return found


def the(scene, phrase: str):
    (only,) = things(scene, phrase)
    return only


def stands(o, relation: str, other) -> bool:
    dx, dy = o.column - other.column, o.row - other.row
    return {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[relation]


def yes(condition: bool) -> str:
    return "yes" if condition else "no"


def brute_force(scene, text: str) -> str:
    """The answer, read off the words alone."""
    plain = re.sub(r"\((?:\?P<\w+>|\?:)", "(?:", THING)
    if m := re.fullmatch(rf"what color is the thing {RELATION} the ({plain})\?", text):
        (found,) = [o for o in scene.objects if stands(o, m["relation"], the(scene, m[2]))]
        return found.color
    if m := re.fullmatch(rf"is the ({plain}) {RELATION} the ({plain})\?", text):
        return yes(stands(the(scene, m[1]), m["relation"], the(scene, m[3])))
    if m := re.fullmatch(rf"what color is the ({plain})\?", text):
        return the(scene, m[1]).color
    if m := re.fullmatch(rf"what shape is the ({plain})\?", text):
        return the(scene, m[1]).shape
    if m := re.fullmatch(rf"where is the ({plain})\?", text):
        o = the(scene, m[1])
        return f"{ROWS[o.row]} {COLUMNS[o.column]}"
    if m := re.fullmatch(r"what is in the (\w+) (\w+)\?", text):
        here = [o for o in scene.objects if (ROWS[o.row], COLUMNS[o.column]) == (m[1], m[2])]
        return f"{here[0].color} {here[0].shape}" if here else "nothing"
    if m := re.fullmatch(rf"is there a ({plain})\?", text):
        return yes(bool(things(scene, m[1])))
    if m := re.fullmatch(rf"is the ({plain}) a {SHAPE}\?", text):
        return yes(the(scene, m[1]).shape == m["shape"])
    if m := re.fullmatch(rf"is the ({plain}) {COLOR}\?", text):
        return yes(the(scene, m[1]).color == m["color"])
    if m := re.fullmatch(rf"are there (more|fewer) ({plain}) than ({plain})\?", text):
        difference = len(things(scene, m[2])) - len(things(scene, m[3]))
        return yes(difference > 0 if m[1] == "more" else difference < 0)
    if m := re.fullmatch(rf"how many ({plain}) are there\?", text):
        return str(len(things(scene, m[1])))
    if m := re.fullmatch(rf"how many ({plain}) are (in the \w+ \w+)\?", text):
        return str(len(things(scene, f"{m[1]} {m[2]}")))
    raise AssertionError(f"no rule for {text!r}")


def test_answers_equal_brute_force():
    kinds: Counter[str] = Counter()
    for scene in scenes(150):
        questions = all_questions(scene)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            assert question.answer == brute_force(scene, question.text), (question.text, scene)
            assert len(question.answer.split()) <= 3
            kinds[question.kind] += 1
    assert set(kinds) == set(KINDS)


def majority_share(asked: dict[str, Counter[str]], at_least: int) -> dict[str, float]:
    """Per question text: how often its most frequent answer is right, which is what a blind guess gets."""
    return {t: max(c.values()) / c.total() for t, c in asked.items() if c.total() >= at_least}


def test_answers_are_balanced_within_each_text():
    rng = np.random.default_rng(0)
    balanced: dict[str, Counter[str]] = defaultdict(Counter)
    unbalanced: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in scenes(600):
        candidates = all_questions(scene)
        chosen = choose_questions(candidates, balanced, rng, per_kind=2)
        assert len({question.text for question in chosen}) == len(chosen)
        for question in candidates:
            unbalanced[question.text][question.answer] += 1
    shares = majority_share(balanced, at_least=20)
    yes_no = {text: share for text, share in shares.items() if set(balanced[text]) <= {"yes", "no"}}
    assert len(yes_no) > 30
    assert max(yes_no.values()) <= 0.65
    before = majority_share(unbalanced, at_least=20)
    assert np.mean(list(shares.values())) < np.mean([before[text] for text in shares]) - 0.1


SIZES = {"train": 6, "val": 2}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_data_set_is_a_function_of_its_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ensure_toy_data(tmp_path / name, SIZES, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c
    before = (tmp_path / "a/toy.json").stat().st_mtime_ns
    ensure_toy_data(tmp_path / "a", SIZES, 1)
    assert (tmp_path / "a/toy.json").stat().st_mtime_ns == before
    ensure_toy_data(tmp_path / "a", SIZES, 2)
    assert contents(tmp_path / "a") == c


_KILLED_BUILD = """
import os, sys
from pathlib import Path
from trainer.toy.dataset import ensure_toy_data
def progress(done, total):
    if done == 5:
        os.kill(os.getpid(), 9)
ensure_toy_data(Path(sys.argv[1]), {"train": 6, "val": 2}, 1, progress=progress)
"""


def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path):
    command = [sys.executable, "-c", _KILLED_BUILD, str(tmp_path / "data")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert not (tmp_path / "data").exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    ensure_toy_data(tmp_path / "data", SIZES, 1)
    ensure_toy_data(tmp_path / "whole", SIZES, 1)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is no toy data set"):
        ensure_toy_data(tmp_path, SIZES, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_clevr_reader_reads_it_back(tmp_path):
    ensure_toy_data(tmp_path / "data", SIZES, 1)
    records = load_clevr(tmp_path / "data", "train")
    assert len(records) == 6
    kinds = Counter(question.kind for record in records for question in record.questions)
    assert set(kinds) == set(KINDS)
    assert all(record.load_images()[0].size == (IMAGE_PX, IMAGE_PX) for record in records)
    scene = json.loads((tmp_path / "data/scenes/CLEVR_train_scenes.json").read_text())["scenes"][0]
    # CLEVR's relationships: [relation][i] lists the objects that stand so to object i.
    for i, j in itertools.permutations(range(len(scene["objects"])), 2):
        (row_i, column_i), (row_j, column_j) = scene["objects"][i]["cell"], scene["objects"][j]["cell"]
        assert (j in scene["relationships"]["left"][i]) == (column_j < column_i)
        assert (j in scene["relationships"]["front"][i]) == (row_j > row_i)


def test_pictures_show_the_scene():
    """Colours are told by hue, as the light changes brightness; empty cells are grey."""
    rng = np.random.default_rng(3)
    names = list(COLORS)
    hues = np.array([COLORS[name] for name in names], dtype=float)
    hues -= hues.mean(1, keepdims=True)
    hues /= np.linalg.norm(hues, axis=1, keepdims=True)
    for scene in scenes(60, seed=5):
        pixels = np.asarray(render(scene, rng), dtype=float)
        assert pixels.shape == (IMAGE_PX, IMAGE_PX, 3)
        cells = {(o.row, o.column) for o in scene.objects}
        for o in scene.objects:
            x, y = int(o.x_px), int(o.y_px)
            middle = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            assert names[int(np.argmax(hues @ (middle - middle.mean())))] == o.color
            assert np.ptp(middle) > 40
        for row, column in itertools.product(range(GRID), repeat=2):
            cell = pixels[row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX]
            assert (np.ptp(cell[6:10, 6:10].mean((0, 1))) < 15) == ((row, column) not in cells)


def test_shapes_differ_in_width_near_their_top():
    """At three quarters of the radius above the centre: a square is 1.76 r wide, a circle 1.32 r, a triangle 0.28 r."""
    rng = np.random.default_rng(0)
    widths: dict[str, list[float]] = defaultdict(list)
    for scene in scenes(80, seed=6):
        pixels = np.asarray(render(scene, rng), dtype=float)
        for o in scene.objects:
            line = pixels[int(o.y_px - 0.75 * o.radius_px), o.column * CELL_PX : (o.column + 1) * CELL_PX]
            widths[o.shape].append(float((np.ptp(line, axis=1) > 60).sum() / o.radius_px))
    medians = [float(np.median(widths[shape])) for shape in ("square", "circle", "triangle")]
    assert medians == pytest.approx([1.76, 1.32, 0.28], abs=0.25)


def test_the_tokenizer_knows_every_word(tmp_path):
    tokenizer = toy_tokenizer()
    texts = {text for scene in scenes(100) for q in all_questions(scene) for text in (q.text, q.answer)}
    ensure_toy_data(tmp_path / "data", SIZES, 1)
    for record in load_clevr(tmp_path / "data", "train"):
        texts |= {caption(record).text, caption(record).answer}
    unknown = [text for text in texts if tokenizer.unk_token_id in tokenizer(text)["input_ids"]]
    assert unknown == []


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_new_model_learns(tmp_path, family):
    ensure_toy_data(tmp_path / "data", {"train": 128}, 1)
    records = load_clevr(tmp_path / "data", "train")
    save_folder(new_model(family, 1), tmp_path / "model")
    model = load_vlm(str(tmp_path / "model"))
    losses = fit(model, records, Stage(30, 3e-3, hard_questions=2), seed=1)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    assert not any(parameter.requires_grad for parameter in model.hf_model.parameters())
