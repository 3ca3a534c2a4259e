"""The page at `/`, and the Content-Security-Policy that lets it do what it does and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Page:
    """html: the whole page, one file. policy: value of the header Content-Security-Policy."""

    html: str
    policy: str


def load_page() -> Page:
    """Read page.html; its one style and one script are allowed by their digests, so nothing injected would run."""
    html = PAGE.read_text(encoding="utf-8")
    directives = {
        "default-src": "'none'",
        "style-src": _digest(html, "style"),
        "script-src": _digest(html, "script"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return Page(html, "; ".join(f"{name} {value}" for name, value in directives.items()))


def _digest(html: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
