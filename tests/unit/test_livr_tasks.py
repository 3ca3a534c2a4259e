"""The nine task builders, each on a few raw files that the test writes in the published layout."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from shared.errors import ConfigError, DataError
from trainer.cli import app
from trainer.data.livr_tasks import TASKS, build_task
from trainer.data.livr_tasks.coco_tasks import jigsaw, jittered, object_localization
from trainer.data.livr_tasks.correspondence import visual_correspondence
from trainer.data.livr_tasks.drawing import intersection_over_union, with_points
from trainer.data.livr_tasks.likeness import relative_reflectance
from trainer.data.livr_tasks.perceptual_hash import SeenImages, perceptual_hash

SIZE = (96, 80)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Smooth and coloured, so that crops, hashes and points differ from place to place and image to image."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def save(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def coco(raw: Path, n: int = 12) -> None:
    images, annotations = [], []
    for i in range(n):
        save(raw / "train2017" / f"{i:012d}.jpg", picture(i))
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": SIZE[0], "height": SIZE[1]})
        annotations.append({"id": i, "image_id": i, "category_id": 18, "bbox": [20 + i, 15, 40, 30], "iscrowd": 0})
        # Two chairs: neither may be asked for. A crowd and a speck neither.
        annotations += [
            {"id": 100 * k + i, "image_id": i, "category_id": 62, "bbox": [5, 5, 30, 30], "iscrowd": 0} for k in (1, 2)
        ]
        annotations.append({"id": 300 + i, "image_id": i, "category_id": 3, "bbox": [0, 0, 90, 20], "iscrowd": 1})
        annotations.append({"id": 400 + i, "image_id": i, "category_id": 4, "bbox": [0, 0, 2, 2], "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in ((18, "dog"), (62, "chair"), (3, "car"), (4, "bird"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (raw / "annotations").mkdir(parents=True)
    (raw / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def pixmo(raw: Path) -> None:
    raw.mkdir()
    rows = []
    for i in range(24):
        data = io.BytesIO()
        picture(i).save(data, "PNG")
        rows.append({"label": "cats", "count": i % 12, "image": {"bytes": data.getvalue()}, "image_sha256": f"h{i}"})
    pq.write_table(pa.Table.from_pylist(rows), raw / "train-0.parquet")


def hpatches(raw: Path) -> None:
    for n, name in enumerate(("i_ajuntament", "v_there", "v_wall", "i_dome")):
        for i in range(1, 7):
            save(raw / name / f"{i}.ppm", picture(n))
            if i > 1:
                shift = np.eye(3) + (name[0] == "v") * np.array([[0, 0, i], [0, 0, -i], [0, 0, 0]])
                np.savetxt(raw / name / f"H_1_{i}", shift)


def spair(raw: Path) -> None:
    points = [[12 + 24 * (k % 3), 12 + 28 * (k // 3)] for k in range(6)]
    for i in range(10):
        names = [f"{i}_{side}.jpg" for side in "ab"]
        for k, name in enumerate(names):
            save(raw / "JPEGImages" / "dog" / name, picture(10 * i + k))
        pair = {"src_imname": names[0], "trg_imname": names[1], "category": "dog", "src_kps": points, "trg_kps": points}
        (raw / "PairAnnotation" / "trn").mkdir(parents=True, exist_ok=True)
        (raw / "PairAnnotation" / "trn" / f"{i}.json").write_text(json.dumps(pair))


def funkpoint(raw: Path) -> None:
    points = [[12 + 24 * (k % 3), 12 + 28 * (k // 3)] for k in range(5)]
    entries = []
    for i in range(12):
        save(raw / "images" / f"{i}.jpg", picture(i))
        entries.append({"image": f"{i}.jpg", "task": ("pour", "pound")[i % 2], "keypoints": points})
    (raw / "annotations").mkdir()
    (raw / "annotations" / "train.json").write_text(json.dumps(entries))


def artbench(raw: Path) -> None:
    for s, style in enumerate(("baroque", "realism", "ukiyo_e")):
        for i in range(12):
            save(raw / "train" / style / f"{style}-{i}.jpg", picture(100 * s + i))
        save(raw / "test" / style / f"{style}-test.jpg", picture(999))


def nights(raw: Path) -> None:
    lines = ["id,ref_path,left_path,right_path,left_vote,right_vote,votes,split"]
    for i in range(14):
        paths = [f"{kind}/{i}.png" for kind in ("ref", "distort/a", "distort/b")]
        for k, path in enumerate(paths):
            save(raw / path, picture(3 * i + k))
        votes, split = (3, "train") if i == 12 else (8, "test") if i == 13 else (8, "train")
        lines.append(f"{i},{','.join(paths)},{i % 2},{1 - i % 2},{votes},{split}")
    (raw / "data.csv").write_text("\n".join(lines))


def multi_illumination(raw: Path) -> None:
    for scene in range(6):
        reflectance = np.full((SIZE[1], SIZE[0]), 0.3 + 0.02 * scene)
        reflectance[:, SIZE[0] // 2 :] *= 2.2
        for light in range(5):
            falls = np.linspace(0.7 + 0.1 * light, 1.1 - 0.1 * light, SIZE[0])[None, :] * 200
            grey = np.clip(reflectance * falls, 0, 240).astype(np.uint8)
            save(raw / f"scene{scene}" / f"dir_{light}_mip2.jpg", Image.fromarray(grey).convert("RGB"))


RAW: dict[str, tuple[Callable[[Path], None], str]] = {
    "counting": (pixmo, ""),
    "jigsaw": (coco, "(A) the second image"),
    "object_localization": (coco, "(A) Box A"),
    "visual_correspondence": (hpatches, "(D) Point D"),
    "art_style": (artbench, "(B) the third image"),
    "semantic_correspondence": (spair, "(D) Point D"),
    "functional_correspondence": (funkpoint, "(D) Point D"),
    "relative_reflectance": (multi_illumination, "(C) both are about the same"),
    "visual_similarity": (nights, "(B) the third image"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_data_set_is_written_whole_and_again_the_same(tmp_path: Path, task: str) -> None:
    write_raw, option = RAW[task]
    write_raw(tmp_path / "raw")
    seen = []
    progress: list[tuple[int, int]] = []
    for name in ("one", "two"):
        report = build_task(
            task,
            tmp_path / "raw",
            tmp_path / name,
            {"train": 6, "val": 2},
            SeenImages(),
            3,
            lambda done, total: progress.append((done, total)),
        )
        assert report.written == {"val": 2, "train": 6}
        assert progress[-8:] == [(n, 8) for n in range(1, 9)]
        seen.append({file.name: file.read_bytes() for file in sorted((tmp_path / name).rglob("*.*"))})
    assert seen[0] == seen[1]
    lines = [json.loads(line) for line in (tmp_path / "one" / "train.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == 6
    for line in lines:
        (question,) = line["questions"]
        assert question["kind"] == task
        assert option in question["question"]
        assert all(Image.open(tmp_path / "one" / name).size for name in line["images"])
        assert question["answer"] in ("(A)", "(B)", "(C)", "(D)") or 2 <= int(question["answer"]) <= 10
    with pytest.raises(ConfigError, match=r"val\.jsonl: there already"):
        build_task(task, tmp_path / "raw", tmp_path / "one", {"val": 2}, SeenImages())


def examples(task: Callable, raw: Path, n: int, seed: int = 0) -> list:
    found = task(raw, np.random.default_rng(seed))
    return [next(found) for _ in range(n)]


def right_picture(example) -> Image.Image:
    return example.pictures[["(A)", "(B)"].index(example.answer) + 1]


def test_jigsaw_pieces(tmp_path: Path) -> None:
    """The right piece completes the image; the answers are balanced."""
    coco(tmp_path, 40)
    made = examples(jigsaw, tmp_path, 40)
    for example in made:
        (original,) = example.originals
        whole = example.pictures[0].copy()
        corner = (whole.width - whole.width // 2, whole.height - whole.height // 2)
        assert whole.getpixel((whole.width - 1, whole.height - 1)) == (0, 0, 0)
        whole.paste(right_picture(example), corner)
        assert whole.tobytes() == original.tobytes()
    assert 10 <= Counter(example.answer for example in made)["(A)"] <= 30


def test_boxes(tmp_path: Path) -> None:
    """Only the dog can be asked for, and its wrong box overlaps as much as it should."""
    coco(tmp_path)
    assert all("the dog " in example.question for example in examples(object_localization, tmp_path, 12))
    rng = np.random.default_rng(0)
    for _ in range(100):
        x, y, width, height = (*rng.uniform(0, 40, 2), *rng.uniform(10, 40, 2))
        box = (x, y, x + width, y + height)
        moved = jittered(box, SIZE, rng)
        assert moved is not None
        assert 0.2 <= intersection_over_union(box, moved) <= 0.5
        assert 0 <= moved[0] < moved[2] <= SIZE[0]
        assert 0 <= moved[1] < moved[3] <= SIZE[1]
    assert intersection_over_union((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)


def test_corresponding_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right option lies where the homography takes REF, and no two circles touch."""
    hpatches(tmp_path)
    drawn: list = []
    monkeypatch.setattr(
        "trainer.data.livr_tasks.correspondence.with_points",
        lambda image, points, labels: drawn.append(list(points)) or with_points(image, points, labels),
    )
    made = examples(visual_correspondence, tmp_path, 20)
    for example, (reference,), options in zip(made, drawn[::2], drawn[1::2], strict=True):
        right = options["ABCD".index(example.answer[1])]
        offset = (right[0] - reference[0], right[1] - reference[1])
        shift = round(offset[0])
        assert offset == pytest.approx((shift, -shift))
        assert shift == 0 if example.sources[0].startswith("i_") else shift in range(2, 7)
        gaps = [np.hypot(a[0] - b[0], a[1] - b[1]) for i, a in enumerate(options) for b in options[:i]]
        assert min(gaps) >= 0.1 * max(SIZE)


def test_similar_images_follow_the_votes(tmp_path: Path) -> None:
    nights(tmp_path)
    for example in examples(TASKS["visual_similarity"], tmp_path, 12):
        number = int(Path(example.sources[0]).stem)
        side = "b" if number % 2 == 0 else "a"  # left_vote = number % 2
        assert right_picture(example).tobytes() == Image.open(tmp_path / f"distort/{side}/{number}.png").tobytes()
        assert number < 12, "too few votes, or of the test split"
    with pytest.raises(StopIteration):
        examples(TASKS["visual_similarity"], tmp_path, 13)


def test_styles_and_test_folder(tmp_path: Path) -> None:
    artbench(tmp_path)
    for example in examples(TASKS["art_style"], tmp_path, 10):
        reference, right, wrong = (source.split("/")[0] for source in example.sources)
        assert reference == right != wrong


def test_reflectance_answers_are_those_of_the_surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right half reflects 2.2 times as much, whatever the light does."""
    multi_illumination(tmp_path)
    drawn: list = []
    monkeypatch.setattr(
        "trainer.data.livr_tasks.likeness.with_points", lambda image, points, _: drawn.append(points) or image
    )
    made = examples(relative_reflectance, tmp_path, 12)
    assert [example.answer for example in made[:3]] == ["(A)", "(B)", "(C)"]
    for example, (a, b) in zip(made, drawn, strict=True):
        dark = [point[0] < SIZE[0] / 2 for point in (a, b)]
        assert dark == {"(A)": [True, False], "(B)": [False, True]}.get(example.answer, [dark[0]] * 2)


def test_hashes_see_through_encoding_and_tell_pictures_apart() -> None:
    image = picture(1)
    data = io.BytesIO()
    image.resize((70, 60)).filter(ImageFilter.GaussianBlur(0.5)).save(data, "JPEG", quality=60)
    test_set = SeenImages([picture(0), image])
    assert len(test_set) == 2
    assert Image.open(data) in test_set
    assert not any(picture(seed) in test_set for seed in range(2, 40))
    assert image not in SeenImages()
    assert perceptual_hash(image) == perceptual_hash(image.copy())


def test_no_raw_image_is_in_two_splits_or_in_the_test_set(tmp_path: Path) -> None:
    funkpoint(tmp_path / "raw")
    test_set = SeenImages([picture(4)])
    report = build_task(
        "functional_correspondence", tmp_path / "raw", tmp_path / "to", {"train": 6, "val": 4}, test_set
    )
    assert report.in_test_set > 0
    assert report.in_other_split > 0
    # Marks are small: an image is found again among the raw ones by its hash.
    raw = {int(perceptual_hash(picture(i))): i for i in range(12)}

    def shown(split: str) -> set[int]:
        found = set()
        for file in (tmp_path / "to" / "images" / split).glob("*.png"):
            own = int(perceptual_hash(Image.open(file)))
            found.add(raw[min(raw, key=lambda other: (other ^ own).bit_count())])
        return found

    assert not shown("train") & shown("val")
    assert 4 not in shown("train") | shown("val")


@pytest.mark.parametrize(
    ("task", "damage", "expected"),
    [
        ("jigsaw", "empty", r"no \.jpg, \.jpeg, \.png file; give the data set as it is published"),
        ("jigsaw", "image", r"\.jpg: image cannot be read .*copy it again"),
        ("object_localization", "json", r"instances_train2017\.json: not JSON"),
        ("visual_correspondence", "empty", r"no folder i_\* or v_\*"),
        ("visual_similarity", "empty", r"data\.csv: missing"),
        ("jigsaw", "few", r"12 examples of jigsaw for train, 50 were asked for"),
    ],
)
def test_damage_is_named(tmp_path: Path, task: str, damage: str, expected: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    if damage != "empty":
        raw.rmdir()
        RAW[task][0](raw)
    if damage == "image":
        for file in (raw / "train2017").iterdir():
            file.write_bytes(file.read_bytes()[:50])
    if damage == "json":
        (raw / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DataError, match=expected):
        build_task(task, raw, tmp_path / "to", {"train": 50 if damage == "few" else 2}, SeenImages())


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 'puzzle' is not known; use one of counting, jigsaw"):
        build_task("puzzle", tmp_path, tmp_path, {}, SeenImages())


def test_the_command_line_leaves_the_test_set_out(tmp_path: Path) -> None:
    coco(tmp_path / "raw")
    for i in (3, 7):
        save(tmp_path / "blink" / f"{i}.png", picture(i))
    arguments = ["--task", "jigsaw", "--raw", str(tmp_path / "raw"), "--to", str(tmp_path / "to"), "--train", "8"]
    done = CliRunner().invoke(app, ["data", "livr", *arguments, "--val", "2", "--exclude", str(tmp_path / "blink")])
    assert done.exit_code == 0, done.output
    assert "val 2, train 8 records" in done.output
    assert "left out: 2 like one of the test set's 2 images" in done.output
    assert len((tmp_path / "to" / "train.jsonl").read_text().splitlines()) == 8
