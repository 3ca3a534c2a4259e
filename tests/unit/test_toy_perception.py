"""What toy model E is asked before any task, read off the scenes; records of several images through the builder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shared.messages import Question
from shared.reading import pack_questions, score_answers
from shared.vlm import load_vlm
from trainer.toy.build import PixelStore, Stage, accuracy, batches, fit, without_some_images
from trainer.toy.perception import ORDINALS, perception_records, sample_perception
from trainer.toy.tasks import TASKS
from trainer.toy.tasks.pictures import GRAY, Picture, Thing
from trainer.toy.tiny_vlms import TASK_WORDS, new_model, save_folder, toy_tokenizer
from trainer.toy.world import COLUMNS, ROWS

MODELS = Path(__file__).parents[2] / "trainer/toy/models"
CELLS = [(row, column) for row in ROWS for column in COLUMNS]
CELL = rf"(?P<row>{'|'.join(ROWS)}) (?P<column>{'|'.join(COLUMNS)})"
IMAGE = rf"(?P<image>{'|'.join(ORDINALS)})"


def words_of(thing: Thing | None) -> str:
    if thing is None:
        return "nothing"
    shade = "dark" if thing.reflectance < 0.5 else "gray" if thing.reflectance < 0.7 else "pale"
    return f"{shade if thing.color == GRAY else thing.color} {thing.shape}"


def in_cell(picture: Picture, row: str, column: str) -> Thing | None:
    """The thing within the sixteen pixels that the words name."""
    left, top = 16 * COLUMNS.index(column), 16 * ROWS.index(row)
    found = [t for t in picture.things if left <= t.x_px < left + 16 and top <= t.y_px < top + 16]
    assert len(found) <= 1
    return found[0] if found else None


def differing(one: Picture, two: Picture) -> int:
    return sum(words_of(in_cell(one, *cell)) != words_of(in_cell(two, *cell)) for cell in CELLS)


def nearest(picture: Picture, x: float, y: float) -> Thing:
    return min(picture.things, key=lambda t: np.hypot(t.x_px - x, t.y_px - y))


def label_of(picture: Picture, words: str | None, cell: tuple[str, str] | None) -> str:
    """The label of the one point or box at what is named, or in the cell."""
    places = {label: (x, y) for label, x, y in picture.points}
    places |= {label: ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for label, box in picture.boxes}
    things = {label: nearest(picture, *place) for label, place in places.items()}
    (label,) = [
        label for label, t in things.items() if (words_of(t) == words if cell is None else t == in_cell(picture, *cell))
    ]
    return label


def same_thing(picture: Picture, label: str, other: Picture) -> str:
    """Where in the other picture lies what looks like the marked thing."""
    ((x, y),) = [(x, y) for name, x, y in picture.points if name == label]
    words = words_of(nearest(picture, x, y))
    (cell,) = [cell for cell in CELLS if words_of(in_cell(other, *cell)) == words]
    return " ".join(cell)


def read_off(pictures: Sequence[Picture], text: str) -> str:
    """The answer, from the words of the question and where things lie."""
    by_ordinal = dict(zip(ORDINALS, pictures, strict=False))
    if m := re.fullmatch(r"which image has a (\w+ \w+)\?", text):
        (ordinal,) = [o for o, p in by_ordinal.items() if m[1] in [words_of(t) for t in p.things]]
        return ordinal
    if m := re.fullmatch(rf"has the {IMAGE} image the same in the {CELL} as the (\w+)\?", text):
        one, two = (in_cell(by_ordinal[o], m["row"], m["column"]) for o in (m["image"], m[4]))
        return "yes" if words_of(one) == words_of(two) else "no"
    if m := re.fullmatch(rf"how many things of the {IMAGE} image are not as in the (\w+)\?", text):
        return str(differing(by_ordinal[m["image"]], by_ordinal[m[2]]))
    if m := re.fullmatch(rf"is the {IMAGE} image the same as the (\w+)\?", text):
        return "no" if differing(by_ordinal[m["image"]], by_ordinal[m[2]]) else "yes"
    if text == "which image is the same as the first?":
        (ordinal,) = [o for o in ORDINALS[1:] if not differing(by_ordinal["first"], by_ordinal[o])]
        return ordinal
    if m := re.fullmatch(rf"where in the {IMAGE} image is the thing at (?:the point|point (\w)) of the (\w+)\?", text):
        return same_thing(by_ordinal[m[3]], m[2] or "reference", by_ordinal[m["image"]])
    if m := re.fullmatch(rf"which point of the {IMAGE} image is in the {CELL}\?", text):
        return label_of(by_ordinal[m["image"]], words=None, cell=(m["row"], m["column"]))
    if m := re.fullmatch(rf"which (?:point|box) of the {IMAGE} image (?:is at|has) the (\w+ \w+)\?", text):
        return label_of(by_ordinal[m["image"]], words=m[2], cell=None)
    m = re.search(IMAGE, text)
    assert m, text
    picture = by_ordinal[m["image"]]
    start = text[: m.start()]
    if m := re.fullmatch(rf"what (is|color is) in the {CELL} of the ", start):
        thing = in_cell(picture, m["row"], m["column"])
        return words_of(thing) if m[1] == "is" or thing is None else thing.color
    if m := re.fullmatch(r"(what is at|where is) (?:the point|point (\w)) of the ", start):
        ((x, y),) = [(x, y) for label, x, y in picture.points if label == (m[2] or "reference")]
        return (
            words_of(nearest(picture, x, y))
            if m[1] == "what is at"
            else f"{ROWS[int(y // 16)]} {COLUMNS[int(x // 16)]}"
        )
    if m := re.fullmatch(r"what is in box (\w) of the ", start):
        left, top, right, bottom = dict(picture.boxes)[m[1]]
        return words_of(nearest(picture, (left + right) / 2, (top + bottom) / 2))
    if start == "what style has the ":
        return f"{picture.style.palette} {picture.style.texture} {picture.style.outline}"
    m = re.fullmatch(r"how many (?:(red|green|blue|yellow) )?(thing|circle|square|triangle)s has the ", start)
    assert m, text
    return str(sum(m[1] in (None, t.color) and m[2] in ("thing", t.shape) for t in picture.things))


def test_answers_are_read_off_the_pictures() -> None:
    tokenizer = toy_tokenizer(TASK_WORDS)
    kinds: Counter[str] = Counter()
    images: Counter[int] = Counter()
    for seed in range(250):
        pictures, questions = sample_perception(np.random.default_rng(seed))
        images[len(pictures)] += 1
        assert len({q.text for q in questions}) == len(questions)
        for question in questions:
            assert read_off(pictures, question.text) == question.answer, question
            assert tokenizer.unk_token_id not in tokenizer(f"{question.text} {question.answer}")["input_ids"]
            kinds[question.kind] += 1
    assert set(kinds) == {
        *("cell", "covered", "point", "where", "box", "label", "style", "count", "same", "differ", "which"),
        *("alike", "match"),
    }
    assert set(images) == {1, 2, 3}


def test_no_task_is_among_the_questions() -> None:
    questions = {q.text for seed in range(100) for q in sample_perception(np.random.default_rng(seed))[1]}
    tasks = {
        task.make(np.random.default_rng(i), task.answers[0]).question for task in TASKS.values() for i in range(40)
    }
    assert not questions & tasks


def test_records_are_a_function_of_the_seed() -> None:
    calls: list[None] = []
    one, two, other = (perception_records(12, seed, lambda: calls.append(None)) for seed in (1, 1, 2))
    assert [(r.image_bytes(), r.questions) for r in one] == [(r.image_bytes(), r.questions) for r in two]
    assert not {d for r in one for d in r.image_bytes()} & {d for r in other for d in r.image_bytes()}
    assert len(calls) == 36


def test_several_images_are_cut_into_the_rows_they_belong_to(tmp_path: Path) -> None:
    """Scores of a batch of records with one to three images equal those of each record alone."""
    save_folder(new_model("qwen2_5_vl", 1), tmp_path, TASK_WORDS)
    model = load_vlm(str(tmp_path)).freeze()
    records = perception_records(8, 3)
    assert {len(r.images) for r in records} == {1, 2, 3}
    indices = np.array([5, 0, 7, 2, 3])
    questions = [[q.message for q in records[i].questions[:2]] for i in indices]
    with torch.no_grad():
        tokens = PixelStore(model, records).tokens(model, indices)
        together = score_answers(model, pack_questions(model, tokens.media, questions), torch.cat(tokens.tokens))
        alone = []
        for i, asked in zip(indices, questions, strict=True):
            own = model.image_tokens(records[i].load_images()).in_rows([len(records[i].images)])
            alone.append(score_answers(model, pack_questions(model, own.media, [asked]), torch.cat(own.tokens)))
    torch.testing.assert_close(together.logprobs_N, torch.cat([a.logprobs_N for a in alone]), atol=1e-5, rtol=1e-5)
    media, shown_ID = without_some_images(tokens, np.random.default_rng(0))
    assert 0 < sum(not row for row in media) < len(indices)
    assert len(shown_ID) == sum(medium.length for row in media for medium in row)


def test_records_without_a_scene_have_no_caption() -> None:
    records = perception_records(64, 5)
    indices, questions = next(batches(records, seed=1, hard_questions=3))
    for index, asked in zip(indices, questions, strict=True):
        assert set(asked) <= {Question(q.text, q.answer) for q in records[index].questions}
        assert 0 < len(asked) <= 7


def test_a_model_goes_on_to_several_images(tmp_path: Path) -> None:
    """From A's weights with more words, as E does."""
    save_folder(load_vlm(str(MODELS / "A")).hf_model, tmp_path, TASK_WORDS)
    model = load_vlm(str(tmp_path))
    records = perception_records(64, 4)
    losses = fit(model, records, Stage(10, 3e-3, hard_questions=3), seed=1)
    assert losses[-1] < 0.9 * losses[0]
    assert set(accuracy(model, records)) == {"all"} | {q.kind for r in records for q in r.questions}
