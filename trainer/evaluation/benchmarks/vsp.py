"""VSP, visual spatial planning (Wu et al. 2024): ten tasks on mazes and stacks of blocks, with their simulators.

    ROOT/maze/TASK/maps/LEVEL/{img,question,answer,pure_text}/N.*
    ROOT/blocks/TASK/maps/LEVEL/{image_input,text_input}/N.*, annotation.txt
    ROOT/blocks/task-main/maps/LEVEL/{input_img,output_img}/N.jpg, info.txt

Source: UCSB-NLP-Chang/Visual-Spatial-Planning, each task's test.py and eval.py. The questions are put in this project's
words, without the in-context example images of test.py. Differences of scoring: where the relative position is asked
for, eval.py ignores directions too many; here they are wrong. That `output_img` lies beside `input_img`: not verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import DataError
from trainer.evaluation.benchmarks.choices import lettered, split_options
from trainer.evaluation.benchmarks.files import Row, image_file, read_text
from trainer.evaluation.benchmarks.records import LETTERS, AnswerKind, BenchmarkRecord

_TASKS = {
    "maze/task-main": "img",
    "maze/task1": "img",
    "maze/task2": "img",
    "maze/task3": "img",
    "maze/task4": "img",
    "blocks/task-main": "input_img",
    "blocks/task1": "image_input",
    "blocks/task2": "image_input",
    "blocks/task3": "image_input",
    "blocks/task4": "image_input",
}
"""Where each task keeps its images."""

_COLOURS = ("blue", "yellow", "purple", "orange", "red", "green")
_DIRECTIONS = ("above", "below", "left", "right", "above,left", "above,right", "below,left", "below,right")
_STEPS = {"L": (0, -1), "R": (0, 1), "U": (-1, 0), "D": (1, 0)}
_WORDS = {"L": "left", "R": "right", "U": "up", "D": "down"}

Cell = tuple[int, int]


def vsp_rows(folder: Path) -> Iterator[Row]:
    """One row per image of each task and level."""
    found = False
    for task, images in _TASKS.items():
        for level in sorted((folder / task / "maps").glob("level*")):
            numbered = [path for path in (level / images).glob("*.*") if path.stem.isdecimal()]
            for image in sorted(numbered, key=lambda path: int(path.stem)):
                found = True
                yield Row({"task": task, "level": level, "number": image.stem, "image": image}, str(image))
    if not found:
        raise DataError(f"{folder}: no maze/TASK/maps/level*/ or blocks/TASK/maps/level*/; give the folder of both")


def vsp(row: Row, folder: Path) -> Iterator[BenchmarkRecord]:
    """The record of one image."""
    task, level, number = row.fields["task"], row.fields["level"], row.fields["number"]
    images = [row.fields["image"]]
    kind: AnswerKind
    choices: tuple[str, ...] = ()
    details: dict[str, Any] = {}
    if task == "maze/task-main":
        details, kind, answer = _maze(row, level / f"pure_text/{number}.txt"), "maze_plan", "a path to the goal"
        question = "Which moves lead the player to the goal without stepping into a hole?"
    elif task == "maze/task1":
        question, kind, choices = read_text(level / f"question/{number}.txt").strip(), "yes_no", ("yes", "no")
        answer = _polarity(row, read_text(level / f"answer/{number}.txt"))
    elif task == "maze/task2":
        question, kind, choices = "Where is the player with respect to the goal?", "directions", _DIRECTIONS
        answer = _relative_position(_maze(row, level / f"pure_text/{number}.txt"))
    elif task == "maze/task3":
        stem = "Which table shows the maze? @ is the player, * the goal, # a hole, _ safe ground."
        _, choices = split_options(row, read_text(level / f"question/{number}.txt"), r"\(@\)")
        question, kind = lettered(stem, choices), "letter"
        answer = _letter(row, read_text(level / f"answer/{number}.txt").rpartition("\n")[2], choices)
    elif task == "maze/task4":
        moves = ", ".join(_WORDS.get(move, move) for move in read_text(level / f"question/{number}.txt").strip())
        question, kind, choices = f"Does the player avoid all holes with these moves: {moves}?", "yes_no", ("yes", "no")
        answer = _polarity(row, read_text(level / f"answer/{number}.txt"))
    elif task == "blocks/task-main":
        fields = _line(row, level / "info.txt", number).split("\t")
        if len(fields) != 6:
            raise row.error(f"info.txt has {len(fields)} fields for this image, not 6", "copy the file again")
        details, kind, answer = {"begin": _stacks(fields[0]), "end": _stacks(fields[2])}, "block_plan", fields[5]
        images.append(level / f"output_img/{images[0].name}")
        question = "The images show stacks of blocks at the beginning and at the end. Which moves lead there?"
    else:
        text = read_text(level / f"text_input/{number}.txt").strip()
        question, kind, choices, answer = _blocks(row, task, text, level / "annotation.txt", number)
    yield BenchmarkRecord(
        f"{task}/{level.name}/{number}",
        tuple(image_file(folder, str(image.relative_to(folder)), row.where) for image in images),
        question,
        choices,
        answer,
        kind,
        category=task,
        details={"task": task, "task_level": f"{task}/{level.name}", **details},
    )


def maze_solved(maze: Mapping[str, Any], plan: str) -> bool:
    """Whether the moves `R,D,…` reach the goal before a hole; off the edge, the player stays (FrozenLake)."""
    row, column = maze["player"]
    for move in plan.split(","):
        down, right = _STEPS[move]
        row, column = (min(max(place, 1), maze["size"]) for place in (row + down, column + right))
        if (row, column) == maze["goal"]:
            return True
        if (row, column) in maze["holes"]:
            return False
    return False


def blocks_solved(task: Mapping[str, Any], plan: str) -> bool:
    """Whether the moves `r>table o>b` give the end's stacks, in any order; an impossible move changes nothing."""
    stacks = [list(stack) for stack in task["begin"]]
    for move in plan.split():
        block, target = move.upper().split(">")
        source = next((stack for stack in stacks if stack and stack[-1] == block), None)
        onto = next((stack for stack in stacks if stack and stack[-1] == target and stack is not source), None)
        if source is None or (onto is None and target != "TABLE"):
            continue
        source.pop()
        if onto is None:
            stacks.append([block])
        else:
            onto.append(block)
    return sorted("".join(stack) for stack in stacks if stack) == sorted(task["end"])


def _maze(row: Row, file: Path) -> dict[str, Any]:
    """Size, player, goal and holes of a maze described in words; cells are (row, column) from 1."""
    text = read_text(file)
    size = re.search(r"(\d+)x\d+ map", text)
    places: dict[str, list[Cell]] = {}
    for line in text.splitlines():
        for name in ("player", "goal", "hole"):
            if f"The {name}" in line:
                places[name] = [
                    (int(r), int(c)) for r, c in re.findall(r"row (\d+), column (\d+)", line, re.IGNORECASE)
                ]
    if not size or len(places.get("player", ())) != 1 or len(places.get("goal", ())) != 1:
        raise row.error(f"{file.name} names no size, player and goal", "copy the file again")
    holes = places.get("hole", [])
    return {"size": int(size[1]), "player": places["player"][0], "goal": places["goal"][0], "holes": holes}


def _relative_position(maze: Mapping[str, Any]) -> str:
    (row, column), (goal_row, goal_column) = maze["player"], maze["goal"]
    vertical = "above" if row < goal_row else "below" if row > goal_row else ""
    horizontal = "left" if column < goal_column else "right" if column > goal_column else ""
    return ",".join(word for word in (vertical, horizontal) if word)


def _blocks(row: Row, task: str, text: str, file: Path, number: str) -> tuple[str, AnswerKind, tuple[str, ...], str]:
    """Question, kind of answer, choices and answer of the tasks about one image of blocks."""
    if task == "blocks/task1":
        return text, "text", _COLOURS, _line(row, file, number)
    if task == "blocks/task4":
        possible = number in read_text(file).split()
        return f"Can these moves be carried out?\n{text}", "yes_no", ("yes", "no"), "yes" if possible else "no"
    stem, choices = split_options(row, text, r"\(@\)")
    stem = stem or "Which text describes the stacks of blocks?"
    return lettered(stem, choices), "letter", choices, _letter(row, _line(row, file, number), choices)


def _line(row: Row, file: Path, number: str) -> str:
    lines = read_text(file).splitlines()
    if not number.isdecimal() or int(number) >= len(lines):
        raise row.error(f"{file.name} has {len(lines)} lines and none for this image", "copy the file again")
    return lines[int(number)].strip()


def _letter(row: Row, index: str, choices: tuple[str, ...]) -> str:
    if not index.isdecimal() or int(index) >= len(choices):
        raise row.error(f"answer {index!r} is none of {len(choices)} options", "copy the files again")
    return LETTERS[int(index)]


def _polarity(row: Row, text: str) -> str:
    answers = {"Y": "yes", "N": "no"}
    if text.strip() not in answers:
        raise row.error(f"answer {text.strip()!r} is neither Y nor N", "copy the files again")
    return answers[text.strip()]


def _stacks(text: str) -> list[str]:
    """`OR0000-P00000-000000` is a stack of orange with red on it, and one of purple."""
    return [stack for part in text.split("-") if (stack := part.replace("0", ""))]
