"""What a look at a data set tells: counts, images and their tokens, answers, what guessing reaches, what is damaged.

Images are opened in several threads. What was learnt of one is kept in a file by the SHA-256 of its content, so that an
interrupted check goes on and a second one only reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shared.config import Config
from shared.errors import DataError
from shared.images import decode_image
from shared.messages import Question
from shared.vlm import Prompt, load_processor, load_prompt, vlm_config
from trainer.data import checked_source
from trainer.data.index import Records
from trainer.data.records import ImageSource, Record
from trainer.data.spans import counted

_THREADS = 4
_AHEAD = 64
_ERRORS_SHOWN = 5
Size = tuple[int, int]


@dataclass(slots=True)
class Damage:
    """What was skipped: how much of it, and the first messages."""

    count: int = 0
    messages: list[str] = field(default_factory=list)

    def __call__(self, error: DataError) -> None:
        """Note an error. Safe to call as `on_error`."""
        self.count += 1
        if len(self.messages) < _ERRORS_SHOWN:
            self.messages.append(str(error))


@dataclass(slots=True)
class Images:
    """What was seen of a split's images: of how many records, how many, sizes (width, height), contents, bytes."""

    records: int = 0
    looked_at: int = 0
    sizes: Counter[Size] = field(default_factory=Counter)
    contents: set[str] = field(default_factory=set)
    file_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SplitCheck:
    """One split. damaged: records that cannot be used. broken: images that cannot be decoded. silent: answers that have
    no tokens, and to how many questions. prior: share of questions that the commonest answer of their kind answers.
    """

    name: str
    records: Records
    damaged: Damage
    broken: Damage
    silent: Counter[str]
    images: Images
    prior: float


@dataclass(frozen=True, slots=True)
class Seen:
    """One image as the vision tower sees it. input_bytes: what the image processor makes of it."""

    tokens: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class DataCheck:
    """A whole data set. seen: what the generator's vision tower makes of an image, by its size. shared: contents in two
    splits, by pair. absent: splits that cannot be read, with the reason.
    """

    config: Config
    splits: Sequence[SplitCheck]
    absent: dict[str, str]
    seen: dict[Size, Seen]
    shared: dict[tuple[str, str], int]
    visual_width: int


def check_data(config: Config, n_images: int, cache: Path) -> DataCheck:
    """Look at the three splits. Raises ConfigError, ModelError.

    n_images: open the images of so many records of each split, evenly spread; 0: of all. cache: a file for what was
    learnt of images, made if it is absent.
    """
    data = config.data
    source, options = checked_source(data)
    prompt = load_prompt(config.generator.model)
    splits, absent = [], {}
    with ImageCache(cache) as known:
        for name in dict.fromkeys((data.train_split, data.val_split, data.test_split)):
            damaged = Damage()
            try:
                records = source.load(data.path, name, damaged, options)
            except DataError as error:
                absent[name] = str(error)
                continue
            broken = Damage()
            images = _look_at_images(records, n_images, known, broken, name)
            splits.append(SplitCheck(name, records, damaged, broken, _silent(records, prompt), images, prior(records)))
    sizes = {size for split in splits for size in split.images.sizes}
    shared = {
        (one.name, other.name): len(one.images.contents & other.images.contents)
        for n, one in enumerate(splits)
        for other in splits[n + 1 :]
    }
    model_config = vlm_config(config.generator.model)
    return DataCheck(
        config,
        splits,
        absent,
        seen_by_tower(config.generator.model, sizes),
        {pair: n for pair, n in shared.items() if n},
        model_config.get_text_config().hidden_size,
    )


def prior(records: Records) -> float:
    """Share of questions that are answered by always giving the commonest answer of their kind."""
    kinds = records.kinds()
    return sum(records.answers(kind).most_common(1)[0][1] for kind in kinds) / kinds.total()


def seen_by_tower(model: str, sizes: set[Size]) -> dict[Size, Seen]:
    """What the generator's vision tower makes of an image, by its size (width, height)."""
    config, processor = vlm_config(model), load_processor(model).image_processor
    merge = getattr(config.vision_config, "spatial_merge_size", 1)
    seen = {}
    for size in counted(sizes, "counting tokens", len(sizes)):
        inputs = processor(images=[[Image.new("RGB", size)]], return_tensors="pt")
        if "image_grid_thw" in inputs:
            tokens = int(inputs["image_grid_thw"].prod()) // merge**2
        else:  # tiles of one size each
            per_side = config.vision_config.image_size // config.vision_config.patch_size
            per_tile = (per_side // getattr(config, "scale_factor", 1)) ** 2
            tokens = per_tile * int(np.prod(inputs["pixel_values"].shape[:-3]))
        seen[size] = Seen(tokens, inputs["pixel_values"].nbytes)
    return seen


class ImageCache:
    """Size or fault of images by the SHA-256 of their content, in a file of JSON lines that is only added to."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        if path.is_file():
            for line in path.read_bytes().splitlines():
                try:
                    digest, fact = json.loads(line)
                    self._known[str(digest)] = fact if isinstance(fact, str) else (int(fact[0]), int(fact[1]))
                except (ValueError, TypeError, IndexError):
                    continue  # the last line of a check that was killed
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> ImageCache:
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def get(self, digest: str) -> Size | str | None:
        """What is known of a content."""
        return self._known.get(digest)

    def put(self, digest: str, fact: Size | str) -> None:
        """Keep it."""
        if digest not in self._known:
            self._known[digest] = fact
            self._file.write(json.dumps([digest, fact]) + "\n")
            self._file.flush()


def _look_at_images(records: Records, n_images: int, known: ImageCache, broken: Damage, name: str) -> Images:
    n = min(n_images or len(records), len(records))
    chosen = records.take(np.linspace(0, len(records) - 1, n).round().astype(np.int64))
    images = Images(records=n)
    for record, source, digest, length, fact in counted(_facts(chosen, known), f"looking at images of {name}", n):
        if isinstance(fact, str):
            broken(DataError(f"{source}: image of record {record.record_id} cannot be decoded ({fact})"))
            if digest:
                known.put(digest, fact)
            continue
        known.put(digest, fact)
        images.looked_at += 1
        images.file_bytes += length
        images.sizes[fact] += 1
        images.contents.add(digest)
    return images


def _facts(records: Records, known: ImageCache) -> Iterator[tuple[Record, ImageSource, str, int, Size | str]]:
    """Record, image, digest, bytes, and size or fault, in order; some images are opened ahead."""
    with ThreadPoolExecutor(_THREADS) as threads:
        waiting: list[Any] = []
        for record in records:
            waiting.extend((record, image, threads.submit(_fact, image, known)) for image in record.images)
            while len(waiting) > _AHEAD:
                record, image, fact = waiting.pop(0)
                yield (record, image, *fact.result())
        for record, image, fact in waiting:
            yield (record, image, *fact.result())


def _fact(image: ImageSource, known: ImageCache) -> tuple[str, int, Size | str]:
    try:
        data = image.read()
    except OSError as error:
        return "", 0, " ".join(str(error).split())
    digest = hashlib.sha256(data).hexdigest()
    fact = known.get(digest)
    if fact is None:
        try:
            fact = decode_image(data).size
        except DataError as error:
            fact = str(error)
    return digest, len(data), fact


def _silent(records: Records, prompt: Prompt) -> Counter[str]:
    """Answers that the generator's tokenizer has no tokens for."""
    counts: Counter[str] = Counter()
    for answer, n in records.answers().items():
        try:
            prompt.branches([[Question("?", answer)]])
        except DataError:
            counts[answer] = n
    return counts


def examples(records: Records, n: int, seed: int = 0) -> list[Record]:
    """Some records drawn at random, of as many kinds as there are."""
    rng = np.random.default_rng(seed)
    kinds = sorted(records.kinds())
    drawn: dict[str, Record] = {}
    for i in range(n):
        of_kind = records.without_kinds([kind for kind in kinds if kind != kinds[i % len(kinds)]])
        record = of_kind[int(rng.integers(len(of_kind)))]
        drawn.setdefault(record.record_id, record)
    return list(drawn.values())


def by_kind(records: Records) -> dict[str, Counter[str]]:
    """Answers of each kind, the commonest kind first."""
    grouped: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, _ in records.kinds().most_common():
        grouped[kind] = records.answers(kind)
    return grouped
