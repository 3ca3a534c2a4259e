"""Small files in the published formats: what is read from them, and the scores of worked-out responses."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shared.errors import DataError
from trainer.data.images import load_image
from trainer.evaluation.benchmarks import load_benchmark, score


def png(red: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(content, "PNG")
    return content.getvalue()


def cell(red: int | None) -> dict | None:
    """An image as the hub embeds it."""
    return None if red is None else {"bytes": png(red), "path": None}


def write_parquet(file: Path, rows: list[dict], **options: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, **options)


def write_tsv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_image(file: Path, red: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(red))


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def reds(record) -> list[int]:
    return [load_image(image).getpixel((0, 0))[0] for image in record.images]


def answers(records) -> list[str]:
    return [record.answer for record in records]


def figures(name, records, responses) -> dict:
    return score(name, records, dict(zip([r.record_id for r in records], responses, strict=True)))["scores"]


def blink_row(task: str, number: int, images: list[int], answer: str) -> dict:
    row = {"idx": f"val_{task}_{number}", "question": "Which?", "choices": ["first", "second"], "answer": answer}
    padded = [*images, None, None, None, None][:4]
    return row | {f"image_{i}": cell(red) for i, red in enumerate(padded, 1)}


def test_blink(tmp_path):
    write_parquet(
        tmp_path / "Jigsaw/val-00000-of-00001.parquet",
        [blink_row("Jigsaw", 1, [1, 2, 3], "(A)"), blink_row("Jigsaw", 2, [4], "(B)")],
    )
    write_parquet(tmp_path / "IQ_Test/val-00000-of-00001.parquet", [blink_row("IQ_Test", 1, [5], "(A)")])
    write_parquet(tmp_path / "Jigsaw/test-00000-of-00001.parquet", [blink_row("Jigsaw", 9, [6], "hidden")])
    records = load_benchmark("blink", tmp_path)
    assert [r.record_id for r in records] == ["val_IQ_Test_1", "val_Jigsaw_1", "val_Jigsaw_2"]
    assert [reds(r) for r in records] == [[5], [1, 2, 3], [4]]
    assert records[0].prompt == "Which?\nA. first\nB. second\nAnswer with the letter of the right option."
    scores = figures("blink", records, ["(A)", "second", "(B) second"])
    assert scores == {"accuracy": 0.75, "by_category": {"IQ_Test": 1, "Jigsaw": 0.5}}


def test_mmvp(tmp_path):
    write_text(
        tmp_path / "Questions.csv",
        "lndex,Question,Options,Correct Answer\n"
        '1,"Is it open, or not?",(a) Open (b) Closed,(a)\n2,Is it open?,(a) Open (b) Closed,(b)\n'
        "3,Which way?,(a) Left (b) Right,(b)\n4,Which way?,(a) Left (b) Right,(a)\n",
    )
    for index in range(1, 5):
        write_image(tmp_path / f"MMVP Images/{index}.jpg", index)
    records = load_benchmark("mmvp", tmp_path)
    assert records[0].question == "Is it open, or not?\nA. Open\nB. Closed"
    assert (answers(records), [r.group for r in records]) == (["A", "B", "B", "A"], ["1", "1", "2", "2"])
    assert reds(records[2]) == [3]
    assert figures("mmvp", records, ["(a)", "Closed", "(a)", "Left"]) == {"pair_accuracy": 0.5, "accuracy": 0.75}


def test_cv_bench(tmp_path):
    def row(idx: int, source: str, answer: str) -> dict:
        fields = {"idx": idx, "task": "Count", "question": "How many?", "choices": ["1", "2", "3"], "answer": answer}
        return fields | {"source": source, "image": cell(idx)}

    write_parquet(tmp_path / "test_2d.parquet", [row(0, "ADE20K", "(C)"), row(1, "COCO", "(A)"), row(2, "COCO", "(B)")])
    write_parquet(tmp_path / "test_3d.parquet", [row(3, "Omni3D", "(A)")])
    records = load_benchmark("cv_bench", tmp_path)
    scores = figures("cv_bench", records, ["C", "B", "B", "(A)"])
    assert (scores["accuracy_2d"], scores["accuracy_3d"], scores["accuracy"]) == (0.75, 1, 0.875)


def test_vstar(tmp_path):
    line = {
        "image": "relative_position/sa_7.jpg",
        "text": "Is the dog left of the cat?\n(A) left\n(B) right\nAnswer with the option's letter from the given "
        "choices directly.",
        "label": "B",
        "category": "relative_position",
        "question_id": 7,
    }
    write_text(tmp_path / "test_questions.jsonl", json.dumps(line) + "\n\n")
    write_image(tmp_path / line["image"], 9)
    (record,) = load_benchmark("vstar", tmp_path)
    assert record.question == "Is the dog left of the cat?\nA. left\nB. right"
    assert (record.choices, record.answer, reds(record)) == (("left", "right"), "B", [9])
    expected = {"accuracy": 1, "by_category": {"relative_position": 1}}
    assert figures("vstar", [record], ["right"]) == expected


def hr_rows() -> list[dict]:
    def row(index: int, cycle: int, category: str, answer: str, image: str) -> dict:
        fields = {"index": index, "question": 'The "sign"\nsays?', "A": "in", "B": "out", "C": "", "D": ""}
        return fields | {"answer": answer, "category": category, "cycle_category": cycle, "image": image}

    images = [base64.b64encode(png(red)).decode() for red in (1, 2)]
    return [
        row(0, 0, "single", "A", images[0]),
        row(1, 0, "cross", "B", images[1]),
        row(2, 1, "single", "B", "0"),
        row(3, 1, "cross", "A", "1"),
    ]


@pytest.mark.parametrize("file_format", ["tsv", "parquet"])
@pytest.mark.parametrize("name", ["hr_bench_4k", "hr_bench_8k"])
def test_hr_bench(tmp_path, name, file_format):
    rows = hr_rows()
    if file_format == "tsv":
        write_tsv(tmp_path / f"{name}.tsv", rows)
    else:
        embedded = [row | {"image": rows[number % 2]["image"]} for number, row in enumerate(rows)]
        write_parquet(
            tmp_path / f"{name}.parquet", [{k: None if v == "" else v for k, v in row.items()} for row in embedded]
        )
    records = load_benchmark(name, tmp_path)
    assert records[0].question == 'The "sign"\nsays?\nA. in\nB. out'
    assert [reds(r) for r in reversed(records)] == [[2], [1], [2], [1]]
    scores = figures(name, records, ["A", "A", "B", "A"])
    assert scores["by_category"] == {"cross": 0.5, "single": 1}
    assert (scores["accuracy"], scores["by_cycle"]) == (0.75, {"0": 0.5, "1": 1})


def test_mmstar(tmp_path):
    question = "What is it?\nOptions: A: vitamin B, C, B: cat, C: both"
    rows = [
        {"index": i, "question": question, "image": cell(i), "answer": "B", "category": "math", "l2_category": level}
        for i, level in enumerate(["geometry", "statistical reasoning"])
    ]
    write_parquet(tmp_path / "mmstar.parquet", rows, row_group_size=1)
    records = load_benchmark("mmstar", tmp_path)
    assert (records[0].question, records[0].choices) == (question, ("vitamin B, C", "cat", "both"))
    assert [reds(r) for r in records] == [[0], [1]]
    assert figures("mmstar", records, ["B: cat", "A"]) == {
        "accuracy": 0.5,
        "by_category": {"math": 0.5},
        "by_l2_category": {"geometry": 1, "statistical reasoning": 0},
    }


@pytest.mark.parametrize("file_format", ["tsv", "parquet"])
def test_mme_realworld_lite(tmp_path, file_format):
    options = ["(A) 4", "(B) 5", "(C) There is none."]
    image = base64.b64encode(png(3)).decode()
    rows = [
        {
            "index": 0,
            "question": "How many?",
            "answer": "C",
            "category": "Perception/Monitoring",
            "l2-category": "car/Attribute_1",
        },
        {"index": 1, "question": "Why?", "answer": "A", "category": "Reasoning/Monitoring", "l2-category": "intention"},
    ]
    if file_format == "tsv":
        text = "The choices are listed below:\n" + "\n".join(options)
        write_tsv(tmp_path / "MME.tsv", [row | {"image": image, "multi-choice options": text} for row in rows])
    else:
        embedded = [row | {"bytes": image, "multi-choice options": options} for row in rows]
        write_parquet(tmp_path / "data/train-00000-of-00001.parquet", embedded)
    records = load_benchmark("mme_realworld_lite", tmp_path)
    assert records[0].choices == ("4", "5", "There is none.")
    assert [reds(r) for r in records] == [[3], [3]]
    assert figures("mme_realworld_lite", records, ["The best answer is (C)", "B"]) == {
        "accuracy": 0.5,
        "by_task": {"Perception": 1, "Reasoning": 0},
        "by_subtask": {"Perception/Monitoring": 1, "Reasoning/Monitoring": 0},
        "by_l2_category": {"Perception/Monitoring/car/attribute": 1, "Reasoning/Monitoring/intention": 0},
    }


def math_vista_problem(pid: str, answer_type: str, answer: str, **more: object) -> dict:
    metadata = {"language": "English", "source": "S", "category": "general-vqa", "task": "figure question answering"}
    metadata |= {"context": "chart", "grade": "daily life", "skills": ["arithmetic reasoning", "statistical reasoning"]}
    problem = {"pid": pid, "question": "How much?", "image": f"images/{pid}.jpg", "choices": None, "unit": None}
    problem |= {"precision": None, "answer": answer, "question_type": "free_form", "answer_type": answer_type}
    return problem | {"metadata": metadata, "query": "…"} | more


def math_vista_problems() -> list[dict]:
    return [
        math_vista_problem("1", "float", "1.2", precision=1.0, unit="m"),
        math_vista_problem("2", "text", "No", question_type="multi_choice", choices=["Yes", "No"]),
        math_vista_problem("3", "integer", "14"),
        math_vista_problem("4", "list", "[1, 2.5]"),
    ]


@pytest.mark.parametrize("file_format", ["json", "parquet"])
def test_math_vista(tmp_path, file_format):
    problems = math_vista_problems()
    if file_format == "json":
        write_text(tmp_path / "testmini.json", json.dumps({problem["pid"]: problem for problem in problems}))
        for problem in problems:
            write_image(tmp_path / problem["image"], int(problem["pid"]))
    else:
        embedded = [problem | {"decoded_image": cell(int(problem["pid"]))} for problem in problems]
        write_parquet(tmp_path / "data/testmini-00000-of-00001-ab.parquet", embedded)
    records = load_benchmark("math_vista", tmp_path)
    assert [r.answer_kind for r in records] == ["float", "letter", "integer", "list"]
    assert [reds(r) for r in records] == [[1], [2], [3], [4]]
    assert records[0].question == "How much? (Unit: m)"
    scores = figures("math_vista", records, ["about 1.24 m", "(B)", "The answer is 14.9", "[2.5, 1]"])
    assert scores["accuracy"] == 0.75
    assert scores["by_answer_type"] == {"float": 1, "integer": 1, "list": 0, "text": 1}
    assert scores["by_question_type"] == {"free_form": 2 / 3, "multi_choice": 1}
    assert scores["by_skills"] == {"arithmetic reasoning": 0.75, "statistical reasoning": 0.75}
    result = score("math_vista", records, dict.fromkeys("1234", ""))
    assert (result["chance"]["n"], result["chance"]["scores"]["accuracy"]) == (1, 0.5)


@pytest.mark.parametrize("file_format", ["json", "parquet"])
def test_we_math(tmp_path, file_format):
    def row(identity: str, key: str, answer: str) -> dict:
        fields = {
            "ID": identity,
            "key": key,
            "question": "OA = ( ) m",
            "option": "A. 3, 5;B. 30; C. B; D. No correct answer",
        }
        return fields | {"answer": answer, "knowledge concept": "Length", "image_path": f"2steps/image/{key}.png"}

    rows = [row("2steps_1", f"2steps_{step}", "B") for step in ("1", "2", "multi")]
    if file_format == "json":
        write_text(tmp_path / "testmini.json", json.dumps(rows))
        for number, fields in enumerate(rows):
            write_image(tmp_path / fields["image_path"], number)
    else:
        embedded = [fields | {"image_path": cell(number)} for number, fields in enumerate(rows)]
        write_parquet(tmp_path / "data/testmini-00000-of-00001.parquet", embedded)
    records = load_benchmark("we_math", tmp_path)
    assert records[0].choices == ("3, 5", "30", "B", "No correct answer")
    assert [reds(r) for r in records] == [[0], [1], [2]]
    scores = figures("we_math", records, ["B", "<Answer>: A", "B"])
    assert (scores["score_strict"], scores["score_loose"], scores["one_step"]) == (0, 1, 0.5)


def write_pope(root: Path) -> None:
    write_image(root / "val2014/COCO_val2014_1.jpg", 8)
    for subset, labels in (("random", ("yes", "no")), ("adversarial", ("yes", "no"))):
        lines = [
            {"question_id": n, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": label}
            for n, label in enumerate(labels, 1)
        ]
        write_text(root / f"coco_pope_{subset}.json", "\n".join(json.dumps(line) for line in lines))


def test_pope(tmp_path):
    write_pope(tmp_path)
    records = load_benchmark("pope", tmp_path)
    assert [r.record_id for r in records] == ["adversarial/1", "adversarial/2", "random/1", "random/2"]
    assert reds(records[0]) == [8]
    scores = figures("pope", records, ["Yes, there is.", "Yes.", "yes", "There is not."])
    assert scores["by_category"]["random"]["f1"] == 1
    assert scores["by_category"]["adversarial"]["f1"] == pytest.approx(2 / 3)
    assert (scores["f1"], scores["yes_ratio"]) == (pytest.approx(5 / 6), 0.75)


def test_natural_bench(tmp_path):
    def row(index: int, kind: str, first: str, second: str) -> dict:
        fields = {"Index": index, "Question_0": "Q0?", "Question_1": "Q1?", "Question_Type": kind}
        images = {"Image_0": cell(10 * index), "Image_1": cell(10 * index + 1)}
        gold = {"Image_0_Question_0": first, "Image_1_Question_0": second}
        return fields | images | gold | {"Image_0_Question_1": second, "Image_1_Question_1": first}

    rows = [row(0, "yes_no", "Yes", "No"), row(1, "multiple_choice", "A", "B")]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    records = load_benchmark("natural_bench", tmp_path)
    assert answers(records) == ["yes", "no", "no", "yes", "A", "B", "B", "A"]
    assert [reds(r) for r in records[4:]] == [[10], [11], [10], [11]]
    assert records[2].question == "Q1?"
    scores = figures("natural_bench", records, ["Yes", "No", "No", "Yes", "A", "B", "B", "B"])
    expected = {"group_accuracy": 0.5, "question_accuracy": 0.75, "image_accuracy": 0.75, "accuracy": 7 / 8}
    assert scores == expected
    chance = score("natural_bench", records, {r.record_id: "" for r in records})["chance"]["scores"]
    assert chance == {"group_accuracy": 1 / 16, "question_accuracy": 1 / 4, "image_accuracy": 1 / 4, "accuracy": 1 / 2}


def test_gqa(tmp_path):
    def question(answer: str, structural: str) -> dict:
        types = {"detailed": "…", "semantic": "attr", "structural": structural}
        return {"imageId": "n1", "question": "Is it?", "answer": answer, "isBalanced": True, "types": types}

    questions = {"1": question("brown", "query"), "2": question("yes", "verify"), "3": question("no", "logical")}
    write_text(tmp_path / "questions1.2/testdev_balanced_questions.json", json.dumps(questions))
    write_image(tmp_path / "images/n1.jpg", 5)
    records = load_benchmark("gqa", tmp_path)
    assert [r.record_id for r in records] == ["1", "2", "3"]
    assert reds(records[0]) == [5]
    assert figures("gqa", records, ["Brown.", "Yes, it is", "no"]) == {
        "accuracy": 2 / 3,
        "by_answer_type": {"binary": 0.5, "open": 1},
        "by_structural": {"logical": 1, "query": 1, "verify": 0},
        "by_semantic": {"attr": 2 / 3},
    }


def test_clevr(tmp_path):
    name = "CLEVR_val_000000.png"
    questions = [
        {
            "image_index": 0,
            "image_filename": name,
            "question": f"{last}?",
            "answer": answer,
            "program": [{"function": last}],
        }
        for last, answer in (("exist", "yes"), ("count", "3"), ("query_color", "cyan"))
    ]
    write_text(tmp_path / "questions/CLEVR_val_questions.json", json.dumps({"questions": questions}))
    write_text(tmp_path / "scenes/CLEVR_val_scenes.json", json.dumps({"scenes": [{"image_filename": name}]}))
    write_image(tmp_path / f"images/val/{name}", 6)
    records = load_benchmark("clevr", tmp_path)
    assert [len(r.choices) for r in records] == [2, 11, 8]
    assert reds(records[1]) == [6]
    scores = figures("clevr", records, ["Yes", "three", "blue"])
    assert scores == {"accuracy": 2 / 3, "by_category": {"count": 1, "exist": 1, "query": 0}}
    chance = score("clevr", records, {r.record_id: "" for r in records})["chance"]
    assert chance["scores"]["accuracy"] == pytest.approx((1 / 2 + 1 / 11 + 1 / 8) / 3)


def test_tally_qa(tmp_path):
    def entry(number: int, answer: int, simple: bool) -> dict:
        fields = {"answer": answer, "data_source": "imported_genome", "image": "VG_100K_2/1.jpg", "image_id": 92410408}
        return fields | {"issimple": simple, "question": "How many headlights?", "question_id": number}

    write_text(tmp_path / "test.json", json.dumps([entry(1, 4, False), entry(2, 0, True), entry(3, 2, True)]))
    write_image(tmp_path / "VG_100K_2/1.jpg", 7)
    records = load_benchmark("tally_qa", tmp_path)
    assert answers(records) == ["4", "0", "2"]
    scores = figures("tally_qa", records, ["there are four", "0", "5"])
    assert scores["by_category"] == {
        "complex": {"accuracy": 1, "rmse": 0},
        "simple": {"accuracy": 0.5, "rmse": pytest.approx((9 / 2) ** 0.5)},
    }


MAZE = """This is a 3x3 map.
The player is at: row 2, column 2;
The hole(s) are at: Row 2, Column 1; Row 3, Column 1; Row 3, Column 3;
The goal is at: Row 3, Column 2."""
TABLES = "\n(A)\n| | Col 1 |\n| Row 1 | @ |\n\n(B)\n| | Col 1 |\n| Row 1 | # |\n"


def write_vsp(root: Path) -> None:
    maze, blocks = root / "maze", root / "blocks"
    for task in ("task-main", "task1", "task2", "task3"):
        write_image(maze / task / "maps/level3/img/0.png", 1)
    for task in ("task-main", "task2"):
        write_text(maze / task / "maps/level3/pure_text/0.txt", MAZE)
    write_text(maze / "task1/maps/level3/question/0.txt", "Is there a hole in row 1, column 2?")
    write_text(maze / "task1/maps/level3/answer/0.txt", "N")
    write_text(maze / "task3/maps/level3/question/0.txt", TABLES)
    write_text(maze / "task3/maps/level3/answer/0.txt", "7-12\n3-4\n5-62\n3-1\n1")
    write_image(maze / "task4/maps/level_step1/img/0.png", 2)
    write_text(maze / "task4/maps/level_step1/img/.DS_Store", "")
    write_text(maze / "task4/maps/level_step1/question/0.txt", "RU")
    write_text(maze / "task4/maps/level_step1/answer/0.txt", "Y")
    for task, level in (("task1", 3), ("task2", 3), ("task3", 3), ("task4", 1)):
        write_image(blocks / task / f"maps/level{level}/image_input/0.jpg", 3)
    write_text(blocks / "task1/maps/level3/text_input/0.txt", "What is the color of the block at stack 1, level 1?")
    write_text(blocks / "task1/maps/level3/annotation.txt", "red\n")
    write_text(blocks / "task2/maps/level3/text_input/0.txt", "Where is red?\n(A) Above.\n(B) Below.\n")
    write_text(blocks / "task2/maps/level3/annotation.txt", "1\n")
    write_text(
        blocks / "task3/maps/level3/text_input/0.txt", "(A)\n- Stack with red block\n\n(B)\n- Stack with blue block\n"
    )
    write_text(blocks / "task3/maps/level3/annotation.txt", "0\n")
    write_text(blocks / "task4/maps/level1/text_input/0.txt", "1. move(orange,purple)\n")
    write_text(blocks / "task4/maps/level1/annotation.txt", "2\n10\n")
    main = blocks / "task-main/maps/level1"
    write_image(main / "input_img/0.jpg", 4)
    write_image(main / "output_img/0.jpg", 5)
    begin, end = "Y00000-P00000-OR0000-000000", "R00000-O00000-YP0000-000000"
    write_text(main / "info.txt", f"{begin}\t3Towers/112\t{end}\t3Towers/112\t2\tmove(r,table,0) move(p,y,1)\n")


def test_vsp(tmp_path):
    write_vsp(tmp_path)
    records = {r.category: r for r in load_benchmark("vsp", tmp_path)}
    assert {task: record.answer for task, record in records.items() if "main" not in task} == {
        "maze/task1": "no",
        "maze/task2": "above",
        "maze/task3": "B",
        "maze/task4": "yes",
        "blocks/task1": "red",
        "blocks/task2": "B",
        "blocks/task3": "A",
        "blocks/task4": "no",
    }
    assert reds(records["blocks/task-main"]) == [4, 5]
    assert records["blocks/task-main"].answer == "move(r,table,0) move(p,y,1)"
    assert "right, up" in records["maze/task4"].question
    assert records["maze/task2"].candidates[:2] == ("above", "below")
    responses = {
        "maze/task-main": "Action plan: U,R,D,L,D",
        "maze/task1": "<Output> No",
        "maze/task2": "<Output> Above,Left",
        "maze/task3": "<Answer> B",
        "maze/task4": "<Output> No",
        "blocks/task1": "<Output> Red.",
        "blocks/task2": "<Output> B",
        "blocks/task3": "<Output> A",
        "blocks/task4": "<Output> No",
        "blocks/task-main": "<Output>\n1. move(purple,yellow)\n2. move(red,table)",
    }
    result = score("vsp", list(records.values()), {r.record_id: responses[task] for task, r in records.items()})
    assert result["unparsed"] == []
    assert {task for task, value in result["scores"]["by_task"].items() if value == 0} == {"maze/task2", "maze/task4"}
    assert result["scores"]["accuracy"] == 0.8
    assert result["scores"]["by_task_level"]["maze/task4/level_step1"] == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("maze/task3/maps/level3/answer/0.txt", "", "answer '' is none of 2 options"),
        ("maze/task1/maps/level3/answer/0.txt", "maybe", "'maybe' is neither Y nor N"),
        ("maze/task2/maps/level3/pure_text/0.txt", "This is a 3x3 map.", "no size, player and goal"),
        ("blocks/task1/maps/level3/annotation.txt", "", "has 0 lines and none for this image"),
        ("blocks/task-main/maps/level1/info.txt", "Y00000\tx\n", "2 fields for this image, not 6"),
    ],
)
def test_damaged_vsp_files_are_named(tmp_path, file, content, message):
    write_vsp(tmp_path)
    write_text(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        load_benchmark("vsp", tmp_path)


@pytest.mark.parametrize(
    ("plan", "solved"),
    [
        ("D", True),
        ("D,L,L", True),
        ("U,U,U,D,D,D", True),
        ("L", False),
        ("R,D", False),
        ("U", False),
    ],
    ids=["straight", "goes on after the goal", "against the edge", "a hole", "a hole later", "stops short"],
)
def test_maze_plans_are_walked(tmp_path, plan, solved):
    write_vsp(tmp_path)
    record = next(r for r in load_benchmark("vsp", tmp_path) if r.category == "maze/task-main")
    assert figures("vsp", [record], [plan])["accuracy"] == solved


@pytest.mark.parametrize(
    ("plan", "solved"),
    [
        ("move(r,table) move(p,y)", True),
        ("move(o,p) move(red,table) move(purple,yellow)", True),
        ("move(r,table)", False),
        ("move(p,y) move(r,p)", False),
        ("move(r,r) move(r,table) move(p,y)", True),
    ],
    ids=["as given", "an impossible move is skipped", "too short", "another end", "onto itself"],
)
def test_block_plans_are_carried_out(tmp_path, plan, solved):
    write_vsp(tmp_path)
    record = next(r for r in load_benchmark("vsp", tmp_path) if r.category == "blocks/task-main")
    assert figures("vsp", [record], [plan])["accuracy"] == solved


# Outside input: clear errors that name file and record.


def edit_pope(root: Path, change) -> None:
    file = root / "coco_pope_random.json"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("\n".join(json.dumps(line) for line in lines))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: edit_pope(root, lambda ls: ls[1].pop("label")), "coco_pope_random.json: line 2: no 'label'"),
        (lambda root: edit_pope(root, lambda ls: ls[0].update(label="maybe")), "line 1: answer 'maybe' is neither"),
        (lambda root: edit_pope(root, lambda ls: ls[1].update(question_id=1)), "line 2: id 'random/1' stands twice"),
        (lambda root: edit_pope(root, lambda ls: ls[1].update(image="../../x.jpg")), "leads out of"),
        (lambda root: edit_pope(root, lambda ls: ls[1].update(image="gone.jpg")), "gone.jpg: image is missing"),
        (lambda root: edit_pope(root, lambda ls: ls[1].update(text="x" * 30_000)), "30000 characters"),
        (lambda root: edit_pope(root, lambda ls: ls.append(["a", "list"])), "line 3: not a JSON object"),
    ],
)
def test_damaged_records_are_named_or_counted(tmp_path, damage, message):
    write_pope(tmp_path)
    damage(tmp_path)
    if "JSON object" not in message:
        skipped: list[DataError] = []
        assert len(load_benchmark("pope", tmp_path, skipped.append)) == 3
        assert len(skipped) == 1
    with pytest.raises(DataError, match=message):
        load_benchmark("pope", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("pope", "coco_pope_random.json", b'{"question_id": 1', "line 1: no valid JSON"),
        ("pope", "coco_pope_random.json", b"\xff\xfe", "line 1: no valid JSON"),
        ("pope", "coco_pope_random.json", b" " * (2**20 + 2), "line 1: longer than"),
        ("gqa", "testdev_balanced_questions.json", b"[" * 100_000, "no valid JSON"),
        ("gqa", "testdev_balanced_questions.json", b"3", "neither a list nor an object"),
        ("tally_qa", "test.json", b"[]", "no usable record of tally_qa"),
        ("mmvp", "Questions.csv", b"Index\n\xff", "no readable csv"),
        ("cv_bench", "test_2d.parquet", b"PAR1", "test_2d.parquet: no readable parquet"),
        ("hr_bench_4k", "hr_bench_4k.tsv", b"index\tquestion\n", "no column 'image'"),
        ("hr_bench_4k", "hr_bench_4k.tsv", b"index\timage\n1\n", "row 0: 1 fields, not 2"),
        ("hr_bench_4k", "hr_bench_4k.tsv", b"index\timage\n1\t\xff\n", "no readable tsv"),
        ("blink", "other.txt", b"", "no \\*/val-\\*.parquet; give the folder"),
        ("vsp", "other.txt", b"", "no maze/TASK/maps/level"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_benchmark(name, tmp_path)


def test_a_tsv_reference_to_a_row_without_image_is_an_error(tmp_path):
    write_tsv(tmp_path / "hr_bench_4k.tsv", [hr_rows()[0] | {"image": "77"}])
    with pytest.raises(DataError, match="row 0: no 'image'"):
        load_benchmark("hr_bench_4k", tmp_path)


def test_damaged_images_are_named_when_they_are_loaded(tmp_path):
    rows = hr_rows()
    rows[0]["image"] = "A" * 100
    rows[1]["image"] = "*" * 100
    write_tsv(tmp_path / "hr_bench_4k.tsv", rows)
    records = load_benchmark("hr_bench_4k", tmp_path)
    with pytest.raises(DataError, match=r"hr_bench_4k.tsv: record at byte \d+: the image cannot be read"):
        load_image(records[0].images[0])
    with pytest.raises(DataError, match="is not base64"):
        load_image(records[1].images[0])


def test_images_that_are_too_large_are_refused(tmp_path, monkeypatch):
    write_pope(tmp_path)
    (record, *_) = load_benchmark("pope", tmp_path)
    monkeypatch.setattr("trainer.data.records.MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match="more than 10"):
        load_image(record.images[0])
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match="decompression bomb"):
        load_image(record.images[0])


def test_images_of_a_parquet_load_in_any_order_across_row_groups(tmp_path):
    rows = [
        {
            "index": i,
            "question": "?\nOptions: A: a, B: b",
            "image": cell(i),
            "answer": "A",
            "category": "c",
            "l2_category": "l",
        }
        for i in range(7)
    ]
    write_parquet(tmp_path / "mmstar.parquet", rows, row_group_size=3)
    records = load_benchmark("mmstar", tmp_path)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 0, 0, 4], [1, 3, 2, 6]):
        assert [reds(records[i])[0] for i in order] == order
