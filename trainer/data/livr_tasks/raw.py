"""Reading raw data sets: folders, tables and images, with errors that name the file and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from shared.errors import DataError

Item = TypeVar("Item")


def folder(raw: Path, *names: str) -> Path:
    """The first of `names` that is a folder in `raw`. Raises DataError."""
    for name in names:
        if (raw / name).is_dir():
            return raw / name
    raise DataError(f"{raw}: no folder {' or '.join(names)}; give the data set as it is published")


def read_json(file: Path) -> Any:
    """A JSON file. Raises DataError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing; give the data set as it is published") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not JSON ({error}); copy the file again") from error


@lru_cache(maxsize=64)
def read_image(file: Path) -> Image.Image:
    """An image as RGB; the last ones are kept, since pairs share images. Raises DataError."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file}: image cannot be read ({' '.join(str(error).split())}); copy it again") from error


def files(where: Path, *endings: str) -> list[Path]:
    """Files with one of the endings, in all folders below, in the order of their names. Raises DataError for none."""
    found = sorted(file for file in where.rglob("*") if file.suffix.lower() in endings)
    if not found:
        raise DataError(f"{where}: no {', '.join(endings)} file; give the data set as it is published")
    return found


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> Iterator[Item]:
    """Every item once, in a random order."""
    return (items[i] for i in rng.permutation(len(items)))


def groups_of(items: Sequence[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items by key."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
