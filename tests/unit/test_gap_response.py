"""The response format: read, written, refused."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ResponseError
from trainer.gap.response import PLACEHOLDER, TAGS, Evidence, Response, Thought, parse_response, write_response

# Words with whatever could confuse a parser but the tags themselves: halves of tags, brackets, line ends.
fragments = st.sampled_from(["<", ">", "</", "think", "<lat", "ent>", "answer>", "|", "\n", " ", "a", "é", "<|latent"])
words = st.one_of(st.text(max_size=20), st.lists(fragments, max_size=8).map("".join)).filter(
    lambda text: not any(tag in text for tag in TAGS)
)


@st.composite
def responses(draw: st.DrawFn) -> Response:
    parts: list[Thought | Evidence] = []
    for kind in draw(st.lists(st.sampled_from("te"), max_size=6)):
        if kind == "e":
            parts.append(Evidence(draw(st.integers(1, 5)), draw(words)))
        elif not parts or isinstance(parts[-1], Evidence):
            parts.append(Thought(draw(words.filter(bool))))
    return Response(tuple(parts), draw(words))


@settings(max_examples=100, deadline=None)
@given(responses())
def test_what_is_written_is_read_back(response):
    assert parse_response(write_response(response)) == response


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(TAGS), fragments), max_size=14).map("".join))
def test_any_text_is_read_or_refused_and_reading_is_stable(text):
    try:
        response = parse_response(text)
    except ResponseError:
        return
    assert parse_response(write_response(response)) == response


@settings(max_examples=100, deadline=None)
@given(responses(), st.data())
def test_a_response_cut_short_is_refused(response, data):
    text = write_response(response)
    with pytest.raises(ResponseError, match=r"character \d+: expected .*, found"):
        parse_response(text[: data.draw(st.integers(0, len(text) - 1))])


def test_by_hand():
    text = (
        "<think>Look at the <b>left</b>.\n<latent>" + 4 * PLACEHOLDER + "</latent> <parser>a red square</parser>"
        "<latent>" + PLACEHOLDER + "</latent><parser></parser> So: </think>\n<answer>red</answer>\n"
    )
    response = parse_response(text)
    assert response.thinking == (
        Thought("Look at the <b>left</b>.\n"),
        Evidence(4, "a red square"),
        Evidence(1, ""),
        Thought(" So: "),
    )
    assert (response.answer, response.n_latents) == ("red", 5)
    assert write_response(response) == text.replace("</latent> <", "</latent><").replace("\n<answer", "<answer").strip()
    assert parse_response("<think></think><answer></answer>") == Response((), "")


P = PLACEHOLDER


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("", 0, "<think>, found the end"),
        ("yes", 0, "<think>, found 'yes'"),
        ("<think>a</think>", 16, "<answer>, found the end"),
        ("<think>a</think>so<answer>b</answer>", 16, "<answer>, found 'so"),
        ("<think>a</think><answer>b</answer>c", 34, "the end, found 'c'"),
        ("<think>a<answer>b</answer>", 8, "<latent> or </think>"),
        (
            "<think><latent></latent><parser>a</parser></think><answer>b</answer>",
            15,
            f"{PLACEHOLDER}, once for each latent",
        ),
        (f"<think><latent>{P}a</latent>", 25, "</latent>, found 'a"),
        (f"<think><latent>{P}</latent>a</think><answer>b</answer>", 34, "<parser>, found 'a"),
        (f"<think><latent>{P}</latent><parser>a<parser>", 43, "</parser>"),
        (f"<think>a{P}</think><answer>b</answer>", 8, "<latent> or </think>"),
        ("<think>a</think><answer>b<think>", 25, "</answer>"),
    ],
)
def test_what_is_refused_and_where(text, position, expected):
    with pytest.raises(ResponseError) as raised:
        parse_response(text)
    assert raised.value.position == position
    assert f"character {position}: expected {expected}" in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.position) == (str(raised.value), position)


def test_parts_that_could_not_be_read_back_cannot_be_made():
    for make, message in (
        (lambda: Thought(""), "is empty"),
        (lambda: Thought("a</think>"), "a thought holds </think>, which would end it"),
        (lambda: Evidence(0, "a"), "at least one"),
        (lambda: Evidence(1, f"{P}"), "a description holds"),
        (lambda: Response((), "<answer>"), "an answer holds"),
        (lambda: Response((Thought("a"), Thought("b")), ""), "two thoughts in a row"),
        (lambda: replace(Evidence(1, "a"), n_latents=-1), "at least one"),
    ):
        with pytest.raises(ResponseError, match=message):
            make()
