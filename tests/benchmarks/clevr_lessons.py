"""What the small VLM of `make clevr-mini` learns from: the training images and everything that their scenes tell.

Eight questions an image are too few. Each comes with the program that answers it, and a program that runs on another
training scene asks something true of that image, in the official words. Beside such questions there are the names and
places of all objects. Images are moved by a few pixels and mirrored; a mirrored scene has its own relations and places,
so that no answer becomes wrong. Nothing of the validation split is used.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.images import decode_image
from shared.messages import Question

IMAGE_PX = (120, 160)
PLACE_PX = 10
ATTRIBUTES = ("size", "color", "material", "shape")
COLUMN_WORDS, ROW_WORDS = (
    tuple(f"{axis}{i}" for i in range(n // PLACE_PX)) for axis, n in zip("xy", (160, 120), strict=True)
)
_MIRROR = {"left": "right", "right": "left"}
_SHIFT_PX = 6
_BORDER_PX = 8
"""A centre of an object is never moved nearer to the border than this."""
_TRIES = 400
"""Programs of other images that are tried on each scene."""
_PROGRAMS, _BATCH, _ORDER = range(3)


@dataclass(frozen=True, slots=True)
class Asked:
    """An official question. n_nodes: of its program, which says how hard it is."""

    text: str
    program: Sequence[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """The last function of the program."""
        return function_of(self.program[-1])


def function_of(node: Mapping[str, Any]) -> str:
    """Of a program's node, as the published files or the generator call it."""
    return str(node.get("function") or node["type"])


def answer(program: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> str | None:
    """What a program answers on a scene; None where something that should be the only one of its sort is not."""
    results: list[Any] = []
    objects = scene["objects"]
    for node in program:
        function, inputs = function_of(node), [results[i] for i in node["inputs"]]
        name, _, attribute = function.partition("_")
        if function == "scene":
            value: Any = list(range(len(objects)))
        elif function == "unique":
            if len(inputs[0]) != 1:
                return None
            value = inputs[0][0]
        elif name == "filter":
            value = [i for i in inputs[0] if objects[i][attribute] == node["value_inputs"][0]]
        elif function == "relate":
            value = scene["relationships"][node["value_inputs"][0]][inputs[0]]
        elif name == "same":
            value = [
                i for i, o in enumerate(objects) if i != inputs[0] and o[attribute] == objects[inputs[0]][attribute]
            ]
        elif name == "query":
            value = objects[inputs[0]][attribute]
        else:
            value = _COMBINED[function](*inputs)
        results.append(value)
    return {True: "yes", False: "no"}[results[-1]] if isinstance(results[-1], bool) else str(results[-1])


_COMBINED = {
    "union": lambda a, b: sorted({*a, *b}),
    "intersect": lambda a, b: sorted({*a} & {*b}),
    "count": len,
    "exist": lambda a: len(a) > 0,
    "less_than": lambda a, b: a < b,
    "greater_than": lambda a, b: a > b,
    **{f"equal_{what}": lambda a, b: a == b for what in ("integer", *ATTRIBUTES)},
}


def mirrored(scene: Mapping[str, Any]) -> dict[str, Any]:
    """The scene of the mirrored image: left and right change places."""
    relations = {_MIRROR.get(direction, direction): of for direction, of in scene["relationships"].items()}
    objects = [
        {**o, "pixel_coords": [IMAGE_PX[1] - 1 - o["pixel_coords"][0], *o["pixel_coords"][1:]]}
        for o in scene["objects"]
    ]
    return {**scene, "objects": objects, "relationships": relations}


def name_of(thing: Mapping[str, Any]) -> str:
    """All that can be seen of an object."""
    return " ".join(thing[attribute] for attribute in ATTRIBUTES)


def place_of(thing: Mapping[str, Any], shift: tuple[int, int]) -> str:
    """Column and row of an object in an image that is moved by (x, y) pixels."""
    x, y = (int(thing["pixel_coords"][i] + shift[i]) // PLACE_PX for i in (0, 1))
    return f"{COLUMN_WORDS[x]} {ROW_WORDS[y]}"


def caption(scene: Mapping[str, Any], shift: tuple[int, int]) -> Question:
    """All objects from left to right."""
    things = sorted(scene["objects"], key=lambda thing: thing["pixel_coords"][0])
    return Question("what is where?", ", ".join(f"{place_of(thing, shift)} {name_of(thing)}" for thing in things))


def shift_of(scene: Mapping[str, Any], rng: np.random.Generator) -> tuple[int, int]:
    """A small move in pixels, (x, y), that keeps every object in the image."""
    moves = []
    for axis, extent in enumerate((IMAGE_PX[1], IMAGE_PX[0])):
        places = [thing["pixel_coords"][axis] for thing in scene["objects"]]
        low = max(-_SHIFT_PX, min(0, _BORDER_PX - int(min(places))))
        high = min(_SHIFT_PX, max(0, extent - 1 - _BORDER_PX - int(max(places))))
        moves.append(int(rng.integers(low, high + 1)))
    return moves[0], moves[1]


def moved(pixels_HWC: np.ndarray, shift: tuple[int, int]) -> np.ndarray:
    """An image moved by (x, y) pixels; what comes in repeats the border."""
    x, y = shift
    padded = np.pad(pixels_HWC, ((_SHIFT_PX, _SHIFT_PX), (_SHIFT_PX, _SHIFT_PX), (0, 0)), mode="edge")
    height, width = pixels_HWC.shape[:2]
    return padded[_SHIFT_PX - y : _SHIFT_PX - y + height, _SHIFT_PX - x : _SHIFT_PX - x + width]


class Lessons:
    """Batches of training images with questions: a pure function of seed and step."""

    def __init__(self, root: Path):
        scenes = json.loads((root / "scenes/CLEVR_train_scenes.json").read_text())["scenes"]
        questions = json.loads((root / "questions/CLEVR_train_questions.json").read_text())["questions"]
        self._asked = [Asked(entry["question"], entry["program"]) for entry in questions]
        self._scenes = scenes
        self._pixels = [
            np.asarray(decode_image((root / "images/train" / scene["image_filename"]).read_bytes())) for scene in scenes
        ]
        own: dict[str, list[int]] = {}
        for number, entry in enumerate(questions):
            own.setdefault(entry["image_filename"], []).append(number)
        self._own = [own[scene["image_filename"]] for scene in scenes]
        self._times: dict[str, Counter[str]] = {}
        for scene, numbers in zip(scenes, self._own, strict=True):
            for number in numbers:
                asked = self._asked[number]
                self._times.setdefault(asked.kind, Counter())[str(answer(asked.program, scene))] += 1
        self._pools = [self._pool(n) for n in range(len(scenes))]

    @property
    def words(self) -> list[str]:
        """Every word of questions and answers."""
        texts = [asked.text.lower() for asked in self._asked]
        words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}
        values = {thing[attribute] for scene in self._scenes for thing in scene["objects"] for attribute in ATTRIBUTES}
        counts = {str(n) for n in range(11)}
        return sorted(
            words | values | counts | {"yes", "no", "where", "at", ",", "user", "assistant", *COLUMN_WORDS, *ROW_WORDS}
        )

    def _pool(self, n: int) -> dict[str, dict[str, list[int]]]:
        """Questions with an answer on scene n, by kind and answer: its own, and those of others that fit."""
        rng = np.random.default_rng([_PROGRAMS, n])
        pool: dict[str, dict[str, list[int]]] = {}
        for number in {*self._own[n], *rng.choice(len(self._asked), _TRIES, replace=False).tolist()}:
            asked = self._asked[number]
            found = answer(asked.program, self._scenes[n])
            if found is not None and found in self._times[asked.kind]:
                pool.setdefault(asked.kind, {}).setdefault(found, []).append(number)
        return pool

    def batch(
        self, seed: int, step: int, n_images: int, n_questions: int, n_places: int, n_captions: int
    ) -> tuple[list[Image.Image], list[list[Question]]]:
        """Images and for each `n_questions` official questions, `n_places` places, and perhaps the whole caption."""
        rng = np.random.default_rng([seed, _BATCH, step])
        images, questions = [], []
        for i in range(n_images):
            epoch, place = divmod(step * n_images + i, len(self._scenes))
            n = int(np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self._scenes))[place])
            flip = bool(rng.random() < 0.5)
            scene = mirrored(self._scenes[n]) if flip else self._scenes[n]
            shift = shift_of(scene, rng)
            pixels = self._pixels[n][:, ::-1] if flip else self._pixels[n]
            images.append(Image.fromarray(np.ascontiguousarray(moved(pixels, shift))))
            things = [scene["objects"][int(k)] for k in rng.permutation(len(scene["objects"]))[:n_places]]
            asked = [Question(f"what is at {place_of(t, shift)}?", name_of(t)) for t in things]
            asked += [caption(scene, shift)] * n_captions
            asked += [self._drawn(n, scene, flip, rng) for _ in range(n_questions)]
            questions.append(asked)
        return images, questions

    def _drawn(self, n: int, scene: Mapping[str, Any], flip: bool, rng: np.random.Generator) -> Question:
        """A question of a scene: its kind and its answer as often as in the official questions."""
        pool = self._pools[n]
        kind = _drawn_from({kind: self._times[kind].total() for kind in pool}, rng)
        chosen = _drawn_from({found: self._times[kind][found] for found in pool[kind]}, rng)
        asked = self._asked[int(rng.choice(pool[kind][chosen]))]
        text = re.sub(r"\b(left|right)\b", lambda found: _MIRROR[found[0]], asked.text) if flip else asked.text
        return Question(text, chosen)


def _drawn_from(times: Mapping[str, int], rng: np.random.Generator) -> str:
    """One of the keys, as often as its number says."""
    shares = np.array(list(times.values())) / sum(times.values())
    return list(times)[int(rng.choice(len(shares), p=shares))]
