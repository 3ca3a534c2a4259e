"""What `data check` found: tables for the terminal, and a page with a grid of samples."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table as Printed

from shared.errors import DataError
from shared.vlm import load_prompt
from trainer.data.check import DataCheck, SplitCheck, by_kind, examples
from trainer.loading import STEPS_AHEAD
from trainer.report.drawing import Triple, bars, draw
from trainer.report.images import side_by_side
from trainer.report.page import Cell, GalleryCard, Listing, Page, Picture, Section, Table, render

PAGE_FILE = "data.html"
_SAMPLES = 12
_TOP_ANSWERS = 12
_LENGTHS = 12


def print_check(check: DataCheck, console: Console) -> None:
    """The tables of the page, and its warnings."""
    for table in (_overview(check), _images(check), _kinds(check)):
        console.print(_printed(table))
    console.print(_verdict(check), highlight=False, soft_wrap=True)
    for line in _warnings(check):
        console.print(f"! {line}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def _printed(table: Table) -> Printed:
    """As it fits a terminal of 80 columns: the cells of a block stand below each other."""
    width = len(table.columns) if any(table.blocks) else 1
    between = " " if width > 1 else "\n"
    headings = ["\n".join([name, *table.columns]) for name in table.blocks] if width > 1 else table.columns
    printed = Printed("", title=table.title)
    for heading in headings:
        printed.add_column(heading, justify="right")
    for name, cells in table.rows.items():
        texts = [f"{cell.text}{between}{cell.detail}".strip() for cell in cells]
        printed.add_row(name, *("\n".join(texts[i : i + width]) for i in range(0, len(texts), width)))
    return printed


def write_page(check: DataCheck, to: Path) -> Path:
    """Write the page into a folder and return its path."""
    page = Page(
        f"Data: {check.config.data.source}, {check.config.data.path}",
        [
            f"source {check.config.data.source}, folder {check.config.data.path}",
            f"visual tokens and answer tokens are those of the generator, {check.config.generator.model}",
        ],
        [
            Section("Overview", _verdict(check), [_overview(check)], listings=_problems(check)),
            Section("Images", "Sizes in pixels, and tokens that the vision tower makes of them.", [_images(check)]),
            Section("Questions and answers", _PRIOR_INTRO, [_kinds(check)], _charts(check)),
            *(_samples(split) for split in check.splits),
        ],
        [f"split {name}: {reason}" for name, reason in check.absent.items()],
    )
    to.mkdir(parents=True, exist_ok=True)
    file = to / PAGE_FILE
    partial = file.with_name(f".{PAGE_FILE}.partial")
    partial.write_text(render(page), encoding="utf-8")
    partial.replace(file)
    return file


_PRIOR_INTRO = (
    "Always giving the commonest answer of a kind, without a look at the image, is right this often. An anchor's "
    "floor should be near it; what latents carry is what lies above it."
)


def _overview(check: DataCheck) -> Table:
    rows: dict[str, list[Cell]] = {}
    for split in check.splits:
        n, kinds, images = len(split.records), split.records.kinds(), split.images
        cells = {
            "records": Cell(f"{n:,}"),
            "questions": Cell(f"{kinds.total():,}", f"{kinds.total() / n:.1f} a record"),
            "kinds of questions": Cell(str(len(kinds))),
            "different answers": Cell(f"{len(split.records.answers()):,}"),
            "commonest answer of each kind": Cell(f"{100 * split.prior:.1f} %"),
            "damaged records": Cell(str(split.damaged.count)),
            "broken images": Cell(str(split.broken.count), f"of {images.looked_at + split.broken.count:,} opened"),
            "images also in another split": Cell(
                str(sum(n for pair, n in check.shared.items() if split.name in pair)), f"of {images.looked_at:,} opened"
            ),
            "questions without answer tokens": Cell(str(split.silent.total())),
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return Table("Splits", [""], [split.name for split in check.splits], rows)


def _images(check: DataCheck) -> Table:
    rows: dict[str, list[Cell]] = {}
    seen = [split for split in check.splits if split.images.sizes]
    for split in seen:
        sizes = list(split.images.sizes.elements())
        tokens = [check.seen[size].tokens for size in sizes]
        input_bytes = float(np.mean([check.seen[size].input_bytes for size in sizes]))
        per_record = (split.images.looked_at + split.broken.count) / split.images.records
        in_all = len(split.records) * per_record
        in_batches = (1 + STEPS_AHEAD) * check.config.train.batch_images * per_record
        cells = {
            "width": Cell(_span([width for width, _ in sizes])),
            "height": Cell(_span([height for _, height in sizes])),
            "tokens an image": Cell(_span(tokens)),
            "images a record": Cell(f"{per_record:.3g}"),
            "image files": Cell(_bytes(in_all * split.images.file_bytes / len(sizes))),
            f"this batch and {STEPS_AHEAD} made ready ahead": Cell(_bytes(in_batches * input_bytes)),
            "room in a feature cache": Cell(_bytes(in_all * float(np.mean(tokens)) * check.visual_width * 4)),
            "index in memory": Cell(_bytes(split.records.index_bytes)),
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    title = "Images and memory (smallest – median – largest; sums are extrapolated from the images that were opened)"
    return Table(title, [""], [split.name for split in seen], rows)


def _kinds(check: DataCheck) -> Table:
    kinds = [by_kind(split.records) for split in check.splits]
    rows = {}
    for kind in dict.fromkeys(kind for answers in kinds for kind in answers):
        held_out = " (held out)" if kind in check.config.data.held_out_kinds else ""
        rows[kind + held_out] = [cell for answers in kinds for cell in _kind_cells(answers.get(kind))]
    return Table("Kinds of questions", [split.name for split in check.splits], ["questions", "commonest answer"], rows)


def _kind_cells(answers: Counter[str] | None) -> list[Cell]:
    if answers is None:
        return [Cell("–"), Cell("–")]
    common, n = answers.most_common(1)[0]
    share = Cell(f"{100 * n / answers.total():.1f} %", common[:40])
    return [Cell(f"{answers.total():,}"), share]


def _charts(check: DataCheck) -> list[Picture]:
    shares: dict[str, dict[str, Triple]] = {}
    lengths: dict[str, dict[str, Triple]] = {}
    train = check.splits[0].records.answers()
    prompt = load_prompt(check.config.generator.model)
    for split in check.splits:
        answers = split.records.answers()
        top = {answer: 100 * answers[answer] / answers.total() for answer, _ in train.most_common(_TOP_ANSWERS)}
        shares[split.name] = {answer[:24]: (share, share, share) for answer, share in top.items()}
        per_length = [0.0] * (_LENGTHS + 1)
        for answer, n in answers.items():
            length = len(prompt.tokenizer(answer, add_special_tokens=False)["input_ids"])
            per_length[min(length, _LENGTHS)] += 100 * n / answers.total()
        longest = max(length for length, share in enumerate(per_length) if share)
        names = [f"{n} or more" if n == _LENGTHS else str(n) for n in range(1, longest + 1)]
        lengths[split.name] = {name: (share,) * 3 for name, share in zip(names, per_length[1:], strict=False)}
    return [
        _bars("answers", "The commonest answers of the training split.", shares),
        _bars("lengths", "Lengths of answers in tokens of the generator.", lengths),
    ]


def _bars(name: str, caption: str, series: dict[str, dict[str, Triple]]) -> Picture:
    highest = max(value for values in series.values() for value, _, _ in values.values())
    light, dark = draw(lambda theme: bars(theme, series, "share of questions in %", (0, 1.05 * highest)))
    words = "; ".join(
        f"{split}: " + ", ".join(f"{label} {value:.0f} %" for label, (value, _, _) in list(values.items())[:4])
        for split, values in series.items()
    )
    return Picture(name, caption, f"{caption} {words}.", light, dark)


def _samples(split: SplitCheck) -> Section:
    cards = []
    for record in examples(split.records, _SAMPLES):
        try:
            image: bytes | None = _png(side_by_side(record.load_images()))
        except DataError:
            image = None
        question = record.questions[0]
        cards.append(GalleryCard(image, question.text, question.kind, question.answer, record.record_id, ()))
    return Section(f"Samples of {split.name}", "Drawn at random, of every kind in turn.", cards=cards)


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format="PNG")
        return file.getvalue()


def _verdict(check: DataCheck) -> str:
    n = len(_warnings(check))
    if n:
        return f"{n} {'thing' if n == 1 else 'things'} to look at."
    return "Nothing found wrong: every record can be used, no opened image is broken or stands in two splits."


def _problems(check: DataCheck) -> list[Listing]:
    lines = _warnings(check)
    return [Listing("What to look at", "\n".join(lines))] if lines else []


def _warnings(check: DataCheck) -> list[str]:
    lines = [f"split {name} cannot be read: {reason}" for name, reason in check.absent.items()]
    for (one, other), n in check.shared.items():
        what = "1 image stands" if n == 1 else f"{n} images stand"
        lines.append(f"{what} in both {one} and {other}: what is measured on {other} is no longer unseen")
    for split in check.splits:
        for damage, what in ((split.damaged, "damaged records"), (split.broken, "broken images")):
            lines += [f"{split.name}: {message}" for message in damage.messages]
            if damage.count > len(damage.messages):
                lines.append(f"{split.name}: {damage.count} {what} in all")
        if split.silent:
            some = ", ".join(repr(answer) for answer, _ in split.silent.most_common(5))
            lines.append(f"{split.name}: {split.silent.total()} questions whose answer has no tokens: {some}")
    return lines


def _span(values: Sequence[int]) -> str:
    low, middle, high = min(values), int(np.median(values)), max(values)
    return str(low) if low == high else f"{low} – {middle} – {high}"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
