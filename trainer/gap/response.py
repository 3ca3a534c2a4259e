"""The form of a GAP response as text, read and written.

    <think> words <latent>PPPP</latent><parser>what the latents show</parser> words </think><answer>words</answer>

P is one placeholder per latent. Every span of latents has a description behind it, which makes its supervision both
visual and in words. White space between blocks is allowed and not kept; inside of text everything is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.errors import ResponseError

THINK, THINK_END = "<think>", "</think>"
LATENT, LATENT_END = "<latent>", "</latent>"
PARSER, PARSER_END = "<parser>", "</parser>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
PLACEHOLDER = "<|latent|>"
TAGS = (THINK, THINK_END, LATENT, LATENT_END, PARSER, PARSER_END, ANSWER, ANSWER_END, PLACEHOLDER)
_TAG = re.compile("|".join(map(re.escape, TAGS)))


@dataclass(frozen=True, slots=True)
class Thought:
    """Words of reasoning, not empty."""

    text: str

    def __post_init__(self) -> None:
        _check_text(self.text, "a thought", may_be_empty=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A span of latents and the words that say what it shows."""

    n_latents: int
    description: str

    def __post_init__(self) -> None:
        if self.n_latents < 1:
            raise ResponseError(f"a span of {self.n_latents} latents; it needs at least one", 0)
        _check_text(self.description, "a description")


@dataclass(frozen=True, slots=True)
class Response:
    """Reasoning with visual evidence in it, then the answer. Two thoughts in a row would be one."""

    thinking: tuple[Thought | Evidence, ...]
    answer: str

    def __post_init__(self) -> None:
        _check_text(self.answer, "an answer")
        for one, other in zip(self.thinking, self.thinking[1:], strict=False):
            if isinstance(one, Thought) and isinstance(other, Thought):
                raise ResponseError("two thoughts in a row; join them to one", 0)

    @property
    def n_latents(self) -> int:
        """Of all spans together."""
        return sum(part.n_latents for part in self.thinking if isinstance(part, Evidence))


def write_response(response: Response) -> str:
    """The response as text, which `parse_response` reads back to an equal one."""
    thinking = "".join(_written(part) for part in response.thinking)
    return f"{THINK}{thinking}{THINK_END}{ANSWER}{response.answer}{ANSWER_END}"


def parse_response(text: str) -> Response:
    """Read a whole response. Raises ResponseError naming what was expected and where."""
    reader = _Reader(text)
    reader.skip_space()
    reader.expect(THINK)
    thinking: list[Thought | Evidence] = []
    while True:
        words = reader.words()
        if words:
            thinking.append(Thought(words))
        if reader.next_is(THINK_END):
            break
        thinking.append(_evidence(reader))
    reader.expect(THINK_END)
    reader.skip_space()
    reader.expect(ANSWER)
    answer = reader.words()
    reader.expect(ANSWER_END)
    reader.skip_space()
    reader.expect_end()
    return Response(tuple(thinking), answer)


def _written(part: Thought | Evidence) -> str:
    if isinstance(part, Thought):
        return part.text
    return f"{LATENT}{PLACEHOLDER * part.n_latents}{LATENT_END}{PARSER}{part.description}{PARSER_END}"


def _evidence(reader: _Reader) -> Evidence:
    reader.expect(LATENT, or_else=THINK_END)
    n_latents = 0
    while reader.next_is(PLACEHOLDER):
        reader.expect(PLACEHOLDER)
        n_latents += 1
    if n_latents == 0:
        reader.fail(f"{PLACEHOLDER}, once for each latent of the span")
    reader.expect(LATENT_END)
    reader.skip_space()
    reader.expect(PARSER)
    description = reader.words()
    reader.expect(PARSER_END)
    return Evidence(n_latents, description)


class _Reader:
    """A place in a text that moves forward over tags and the words between them."""

    def __init__(self, text: str):
        self._text = text
        self._at = 0

    def words(self) -> str:
        """Everything up to the next tag or the end."""
        found = _TAG.search(self._text, self._at)
        start, self._at = self._at, len(self._text) if found is None else found.start()
        return self._text[start : self._at]

    def skip_space(self) -> None:
        rest = self._text[self._at :]
        self._at += len(rest) - len(rest.lstrip())

    def next_is(self, tag: str) -> bool:
        return self._text.startswith(tag, self._at)

    def expect(self, tag: str, or_else: str | None = None) -> None:
        if not self.next_is(tag):
            self.fail(tag if or_else is None else f"{tag} or {or_else}")
        self._at += len(tag)

    def expect_end(self) -> None:
        if self._at < len(self._text):
            self.fail("the end")

    def fail(self, expected: str) -> None:
        found = repr(self._text[self._at : self._at + 20]) if self._at < len(self._text) else "the end"
        raise ResponseError(f"character {self._at}: expected {expected}, found {found}", self._at)


def _check_text(text: str, what: str, may_be_empty: bool = True) -> None:
    if not text and not may_be_empty:
        raise ResponseError(f"{what} is empty; leave it out", 0)
    found = _TAG.search(text)
    if found is not None:
        raise ResponseError(f"{what} holds {found.group()}, which would end it; remove it", found.start())
