"""The page: its parts as plain data, and the HTML that holds all of them in one file.

No script, no request: pictures are data URIs, the one style element is allowed by its hash, everything else is refused
by the page's own Content-Security-Policy. Jinja escapes every text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Cell:
    """A table entry; `detail` stands below it in small type (an interval, a reason)."""

    text: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under `columns`, repeated for each run of `blocks`; every row has blocks × columns cells.

    folded: closed until it is opened.
    """

    title: str
    blocks: Sequence[str]
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart as PNGs for light and dark. name: of its files. alt: what it shows, with its key numbers."""

    name: str
    caption: str
    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True, slots=True)
class GalleryCard:
    """One failed question. image: PNG, or None where the file is gone. answers: anchor, its answer, right or not."""

    image: bytes | None
    question: str
    kind: str
    gold: str
    record: str
    answers: Sequence[tuple[str, str, bool]]


@dataclass(frozen=True, slots=True)
class Listing:
    """Text that is shown as it is: commands, a config."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One heading of the page with what stands below it, in this order."""

    title: str
    intro: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    cards: Sequence[GalleryCard] = ()
    listings: Sequence[Listing] = ()

    @property
    def anchor(self) -> str:
        """Where links of the contents lead."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report. absent: one line for each part that the runs hold no numbers for."""

    title: str
    facts: Sequence[str]
    sections: Sequence[Section]
    absent: Sequence[str] = ()


def render(page: Page) -> str:
    """The HTML of a page."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    return environment.get_template("page.html").render(page=page, style=style, policy=policy)
