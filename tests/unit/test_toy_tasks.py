"""The toy tasks: answers read off what is drawn, no prior in words, splits, files, pictures."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shared.errors import ConfigError, DataError
from trainer.data.jsonl import load_jsonl
from trainer.toy.show import show_task
from trainer.toy.tasks import TASKS, Example, Task
from trainer.toy.tasks.dataset import ensure_tasks, examples, scene_key
from trainer.toy.tasks.one_image import overlap
from trainer.toy.tasks.pictures import LABELS, Picture, Style, Thing, draw, new_picture
from trainer.toy.tasks.points import FORMS
from trainer.toy.tasks.two_steps import STEPS
from trainer.toy.tasks.whole_images import QUADRANT
from trainer.toy.tiny_vlms import TASK_WORDS, toy_tokenizer
from trainer.toy.world import CELL_PX, COLORS, IMAGE_PX, SHAPES, render, sample_scene

HALF = IMAGE_PX // 2


def made(name: str, n: int, seed: int = 0) -> list[Example]:
    """n examples of a task, every answer as often as any other."""
    return [example for _, example in examples(TASKS[name], {"test": n}, np.random.default_rng(seed))]


def drawn(picture: Picture) -> np.ndarray:
    """Pixels, always with the same noise."""
    return np.asarray(draw(picture, np.random.default_rng(0)), dtype=float)


def thing_at(picture: Picture, label: str) -> Thing:
    """The thing that a point marks."""
    ((x, y),) = [(x, y) for name, x, y in picture.points if name == label]
    return min(picture.things, key=lambda t: (t.x_px - x) ** 2 + (t.y_px - y) ** 2)


def count_by_words(example: Example) -> str:
    pattern = rf"how many (?:({'|'.join(COLORS)}) )?(?:({'|'.join(SHAPES)})|thing)s are there\?"
    match = re.fullmatch(pattern, example.question)
    assert match, example.question
    things = example.pictures[0].things
    return str(sum(match[1] in (None, t.color) and match[2] in (None, t.shape) for t in things))


def piece_by_seam(example: Example) -> str:
    """The piece whose pixels go on where the image ends."""
    first, *pieces = (drawn(picture) for picture in example.pictures)
    seams = []
    for piece in pieces:
        across = np.abs(first[HALF - 1, HALF:] - piece[HALF, HALF:])
        along = np.abs(first[HALF:, HALF - 1] - piece[HALF:, HALF])
        seams.append(across.sum() + along.sum())
    return "ab"[int(np.argmin(seams))]


def box_by_pixels(example: Example) -> str:
    """The box that overlaps most with the pixels that change when the named thing is taken away."""
    (picture,) = example.pictures
    match = re.fullmatch(r"which box is around the (\w+ \w+)\?", example.question)
    assert match
    others = tuple(t for t in picture.things if t.name != match[1])
    assert len(others) == len(picture.things) - 1
    bare = replace(picture, boxes=())
    rows, columns = np.nonzero(np.abs(drawn(bare) - drawn(replace(bare, things=others))).max(2) > 8)
    tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    overlaps = {label: overlap(tight, box) for label, box in picture.boxes}
    best, worst = sorted(overlaps, key=overlaps.__getitem__, reverse=True)
    assert overlaps[best] > 0.7
    assert 0.1 < overlaps[worst] < 0.65  # whole pixels: not quite the .2 to .5 of the drawn boxes
    return best


def point_by_neighbours(example: Example) -> str:
    """The label whose translation carries the first image's things onto the second's."""
    first, second = example.pictures
    ((_, x, y),) = first.points
    scores = {}
    for label, to_x, to_y in second.points:
        scores[label] = 0
        for thing in first.things:
            place = np.array([thing.x_px + to_x - x, thing.y_px + to_y - y])
            there = [t for t in second.things if np.hypot(*(place - [t.x_px, t.y_px])) < 4]
            inside = (place > 5).all() and (place < IMAGE_PX - 5).all()
            if there or inside:
                scores[label] += 1 if [t.name for t in there] == [thing.name] else -1
    best, next_best = sorted(scores.values(), reverse=True)[:2]
    assert best > next_best
    return max(scores, key=scores.__getitem__)


def by_style(example: Example) -> str:
    first, *others = (picture.style for picture in example.pictures)
    (index,) = [i for i, style in enumerate(others) if style == first]
    return "ab"[index]


def shape_of_named(example: Example) -> str:
    """The shape of the only thing of the colour, which the hint shows alone."""
    match = re.fullmatch(r"what shape is the (\w+) thing\?", example.question)
    assert match
    assert example.hint is not None
    (thing,) = (thing for thing in example.pictures[0].things if thing.color == match[1])
    assert example.hint.picture.things == (thing,)
    return thing.shape


def shape_after_two_steps(example: Example) -> str:
    """The shape of the thing that the two steps lead to, which the hint shows alone in its place."""
    match = re.fullmatch(r"what shape is the thing ([\w ]+) the thing ([\w ]+) the (\w+ \w+)\?", example.question)
    assert match
    assert example.hint is not None
    (picture,) = example.pictures
    cells = {(int(thing.y_px // CELL_PX), int(thing.x_px // CELL_PX)): thing for thing in picture.things}
    assert len(cells) == len(picture.things)
    ((row, column),) = (cell for cell, thing in cells.items() if thing.name == match[3])
    for step in (match[2], match[1]):
        row, column = row + STEPS[step][0], column + STEPS[step][1]
        thing = cells[row, column]
    assert example.hint.picture.things == (thing,)
    assert example.hint.description == f"a {thing.name}"
    return thing.shape


def part_of_creature(picture: Picture, label: str) -> str:
    """Head and tail by their shape, the legs by which is nearer to the head."""
    thing = thing_at(picture, label)
    if thing.shape != "bar":
        return thing.shape
    (head,) = [t for t in picture.things if t.shape == "circle"]
    legs = sorted((t for t in picture.things if t.shape == "bar"), key=lambda t: distance(t, head))
    assert distance(legs[1], head) > distance(legs[0], head) + 3
    return "front" if thing == legs[0] else "back"


def distance(one: Thing, two: Thing) -> float:
    return float(np.hypot(one.x_px - two.x_px, one.y_px - two.y_px))


def point_by_part(example: Example) -> str:
    first, second = example.pictures
    part = part_of_creature(first, "reference")
    (label,) = [label for label in LABELS if part_of_creature(second, label) == part]
    return label


def point_by_function(example: Example) -> str:
    first, second = example.pictures
    function = {form: name for name, forms in FORMS.items() for form in forms}
    assert not {t.shape for t in first.things} & {t.shape for t in second.things}
    wanted = function[thing_at(first, "reference").shape]
    (label,) = [label for label in LABELS if function[thing_at(second, label).shape] == wanted]
    return label


def by_reflectance(example: Example) -> str:
    (picture,) = example.pictures
    a, b = (thing_at(picture, label).reflectance for label in "ab")
    assert a == b or max(a, b) / min(a, b) > 1.4
    return "none" if a == b else "a" if a < b else "b"


def by_changes(example: Example) -> str:
    first, *others = example.pictures
    changes = [sum(t.name != min(p.things, key=lambda o: distance(o, t)).name for t in first.things) for p in others]
    assert abs(changes[0] - changes[1]) == 2
    return "ab"[int(np.argmin(changes))]


CHECKS = {
    "counting": count_by_words,
    "jigsaw": piece_by_seam,
    "object_localization": box_by_pixels,
    "visual_correspondence": point_by_neighbours,
    "art_style": by_style,
    "semantic_correspondence": point_by_part,
    "functional_correspondence": point_by_function,
    "relative_reflectance": by_reflectance,
    "visual_similarity": by_changes,
    "named_shape": shape_of_named,
    "two_steps": shape_after_two_steps,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_follow_from_what_is_drawn(name: str) -> None:
    for example in made(name, 100):
        assert CHECKS[name](example) == example.answer


@pytest.mark.parametrize("name", TASKS)
def test_words_say_nothing_about_the_answer(name: str) -> None:
    """Within every text each answer is about as frequent as chance has it: a blind guess gets 1 / number of answers."""
    n_answers = len(TASKS[name].answers)
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    n_images = set()
    for example in made(name, 400, seed=1):
        asked[example.question][example.answer] += 1
        n_images.add(len(example.pictures))
    assert len(n_images) == 1
    answers = sum(asked.values(), Counter())
    assert set(answers) == set(TASKS[name].answers)
    assert max(answers.values()) - min(answers.values()) <= 1
    for counts in asked.values():
        expected = counts.total() / n_answers
        chi2 = sum((counts[answer] - expected) ** 2 / expected for answer in TASKS[name].answers)
        # Mean n−1 and variance 2(n−1) if answers are uniform; five standard deviations above.
        assert chi2 < n_answers - 1 + 5 * np.sqrt(2 * (n_answers - 1)), counts


@pytest.mark.parametrize("name", ["jigsaw", "art_style", "visual_similarity"])
def test_candidates_alone_say_nothing_about_the_answer(name: str) -> None:
    """Right and wrong candidates have as many things and styles as often: the first image is needed."""
    figures: list[list[float]] = []
    for example in made(name, 400, seed=2):
        right, wrong = example.pictures[1:] if example.answer == "a" else example.pictures[:0:-1]
        things = [sum(t.x_px > HALF - 4 and t.y_px > HALF - 4 for t in p.things) for p in (right, wrong)]
        reds = [sum(t.color == "red" for t in p.things) for p in (right, wrong)]
        plain = [p.style.texture == "plain" for p in (right, wrong)]
        figures.append([float(one) - float(two) for one, two in (things, reds, plain)])
    differences = np.array(figures)
    assert (np.abs(differences.mean(0)) <= 4 * differences.std(0) / np.sqrt(len(differences)) + 1e-9).all()


@pytest.mark.parametrize("name", TASKS)
def test_no_scene_is_in_two_splits(name: str) -> None:
    keys: dict[str, set[object]] = defaultdict(set)
    for split, example in examples(TASKS[name], {"train": 60, "val": 10, "test": 30}, np.random.default_rng(3)):
        keys[split] |= {scene_key(picture) for picture in example.pictures}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]


def test_scenes_of_an_earlier_split_are_drawn_again() -> None:
    """A task with so few scenes that chance alone would repeat them."""

    def one_of_forty(rng: np.random.Generator, answer: str) -> Example:
        thing = Thing("circle", "red", 4.0 + 4 * int(rng.integers(10)), 4.0 + 4 * int(rng.integers(4)), 4.0)
        return Example((new_picture([thing], rng),), "?", answer)

    places: dict[str, set[object]] = defaultdict(set)
    for split, example in examples(
        Task("few", ("a", "b"), one_of_forty), {"train": 30, "test": 30}, np.random.default_rng(0)
    ):
        places[split].add(scene_key(example.pictures[0]))
    assert places["train"]
    assert places["test"]
    assert not places["train"] & places["test"]


SIZES = {"train": 3, "val": 2, "test": 2}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_data_set_is_a_function_of_its_seed(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    ensure_tasks(tmp_path / "a", list(TASKS), SIZES, 1, lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 77) for i in range(77)]
    ensure_tasks(tmp_path / "b", list(TASKS), SIZES, 1)
    ensure_tasks(tmp_path / "c", list(TASKS), SIZES, 2)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    images = [{hash(data) for name, data in x.items() if name.endswith(".png")} for x in (a, c)]
    assert not images[0] & images[1]
    assert len(images[0]) == sum(name.endswith(".png") for name in a)
    ensure_tasks(tmp_path / "d", ["jigsaw"], SIZES, 1)
    alone = contents(tmp_path / "d")
    assert all(alone[name] == a[name] for name in alone if "/jigsaw_" in name)
    ensure_tasks(tmp_path / "c", list(TASKS), SIZES, 1)
    assert contents(tmp_path / "c") == a


def test_the_jsonl_reader_reads_it_back(tmp_path: Path) -> None:
    ensure_tasks(tmp_path / "data", list(TASKS), SIZES, 1)
    for split, size in SIZES.items():
        records = load_jsonl(tmp_path / "data", split)
        assert Counter(r.questions[0].kind for r in records) == dict.fromkeys(TASKS, size)
        for record, line in zip(records, (tmp_path / f"data/{split}.jsonl").read_text().splitlines(), strict=True):
            assert [q.answer for q in record.questions] == [q["answer"] for q in json.loads(line)["questions"]]
            assert (record.auxiliary is not None) == (record.questions[0].kind in ("named_shape", "two_steps"))
            images = record.load_images()
            assert 1 <= len(images) <= 3
            assert {image.size for image in images} == {(IMAGE_PX, IMAGE_PX)}


def test_unknown_tasks_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no toy task 'chess'; there are counting"):
        ensure_tasks(tmp_path / "data", ["chess"], SIZES)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is no toy data set"):
        ensure_tasks(tmp_path, ["jigsaw"], SIZES)


def test_the_tokenizer_knows_every_word_of_the_tasks() -> None:
    tokenizer = toy_tokenizer(TASK_WORDS)
    assert len(tokenizer) <= 128 - 18  # a generator's sixteen latents and their two markers still fit
    for name, task in TASKS.items():
        for example in made(name, 20):
            words = [example.question] if example.hint is None else [example.question, example.hint.description]
            assert not any(tokenizer.unk_token_id in tokenizer(text)["input_ids"] for text in words), words
        for answer in task.answers:
            assert len(tokenizer(answer)["input_ids"]) == 1


def test_pictures_of_plain_things_are_those_of_the_toy_world() -> None:
    scene = sample_scene(np.random.default_rng(4))
    things = tuple(Thing(o.shape, o.color, o.x_px, o.y_px, o.radius_px) for o in scene.objects)
    picture = Picture(things, scene.light, scene.background)
    assert np.array_equal(drawn(picture), np.asarray(render(scene, np.random.default_rng(0)), dtype=float))


def test_marks_windows_and_styles_change_what_they_should() -> None:
    thing = Thing("square", "red", 24.0, 24.0, 8.0)
    plain = Picture((thing,), (1.0, 1.0), 120)
    marked = replace(plain, points=(("b", 10.5, 30.5),))
    rows, columns = np.nonzero((drawn(marked) != drawn(plain)).any(2))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (8, 12, 28, 32)
    assert (drawn(marked)[30, 10] == LABELS["b"]).all()
    window, hidden = (drawn(replace(plain, **{name: QUADRANT})) for name in ("window", "hidden"))
    assert np.array_equal(window + hidden, drawn(plain))
    assert not window[:HALF].any()
    assert not hidden[HALF:, HALF:].any()
    for style in (Style("stripes"), Style("checks"), Style(palette="dark"), Style(outline="white")):
        rows, columns = np.nonzero((np.abs(drawn(replace(plain, style=style)) - drawn(plain)) > 30).any(2))
        assert len(rows) > 30
        assert min(rows.min(), columns.min()) >= 16
        assert max(rows.max(), columns.max()) <= 32


def test_an_example_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_task("jigsaw", 3, tmp_path / "x.png", Console())
    assert "which piece fits" in capsys.readouterr().out
    assert Image.open(tmp_path / "x.png").size == (3 * 384 + 16, 384)
    with pytest.raises(ConfigError, match="no toy task 'chess'"):
        show_task("chess", 3, tmp_path / "y.png", Console())
