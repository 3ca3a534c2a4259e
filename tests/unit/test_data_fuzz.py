"""Damaged files of every source: whatever is wrong with them, a DataError says so, and `skip` never raises another.

Bytes are changed, cut, doubled; JSON values are replaced by values of another type. The examples are the same in every
run; `FUZZ_EXAMPLES=5000 FUZZ_SEED=1 python -m pytest tests/unit/test_data_fuzz.py` tries others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from shared.config import DataConfig
from shared.errors import DataError
from shared.images import decode_image
from tests.data_samples import SAMPLES, png
from trainer.data import load_records

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "260"))
"""Of each of the eight data sets: 2,080 in all; and a quarter as many images."""
SNIPPETS = [
    b"NaN",
    b"null",
    b"[[[[[[",
    b'"',
    b"\\ud800",
    b"\xff\xfe",
    b"1e999",
    b"{}",
    b"..",
    b"\0",
    b"9" * 40,
    b"\n",
    b",",
]

fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
places = st.floats(0, 1, exclude_max=True)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that damages a file's content."""
    kind = draw(st.sampled_from(["snippet", "cut", "drop", "double", "byte", "value", "value", "value"]))
    first, second, snippet = draw(places), draw(places), draw(st.sampled_from(SNIPPETS))
    byte, value = draw(st.integers(0, 255)), draw(json_values)

    def damage(content: bytes) -> bytes:
        begin, end = sorted((int(first * len(content)), int(second * len(content))))
        changed = {
            "snippet": content[:begin] + snippet + content[begin:],
            "cut": content[:begin],
            "drop": content[:begin] + content[end:],
            "double": content[:end] + content[begin:],
            "byte": content[:begin] + bytes([byte]) + content[begin + 1 :],
        }
        return changed[kind] if kind in changed else with_value(content, first, second, value)

    return damage


def with_value(content: bytes, line_at: float, value_at: float, value: Any) -> bytes:
    """One value of the JSON in a file replaced; a file without JSON loses a byte."""
    lines = content.split(b"\n") if content.count(b"\n") > 1 else [content]
    number = int(line_at * len(lines))
    try:
        tree = json.loads(lines[number])
    except ValueError:
        return content[:-1]
    nodes: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            nodes.append((node, key))
            collect(child)

    collect(tree)
    if not nodes:
        return content[:-1]
    node, key = nodes[int(value_at * len(nodes))]
    node[key] = value
    lines[number] = json.dumps(tree).encode()
    return b"\n".join(lines)


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, list[tuple[Path, bytes]]]:
    """A data set, and the content of its files."""
    root = tmp_path_factory.mktemp("fuzz") / "data"
    fields = SAMPLES[request.param](root, ("train",))
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".png", ".jpg"))
    return DataConfig.model_validate(fields), [(path, path.read_bytes()) for path in files]


@fuzzed
@seed(int(os.environ.get("FUZZ_SEED", "0")))
@given(damage=damages(), which=places, on_error=st.sampled_from(["fail", "skip"]))
def test_damaged_files_raise_nothing_but_data_errors(sample: Any, damage: Any, which: float, on_error: Any) -> None:
    config, files = sample
    path, content = files[int(which * len(files))]
    path.write_bytes(damage(content))
    try:
        records = load_records(config.model_copy(update={"on_error": on_error}), "train")
        for record in records:
            for image in record.load_images():
                assert image.mode == "RGB"
            for question in record.questions:
                assert question.text
                assert question.answer
                (question.kind + question.text + question.answer + record.record_id).encode()
    except DataError:
        pass
    finally:
        path.write_bytes(content)


@settings(max_examples=2 * EXAMPLES, deadline=None, database=None)
@seed(int(os.environ.get("FUZZ_SEED", "0")))
@given(damage=damages())
def test_damaged_images_raise_nothing_but_data_errors(damage: Any) -> None:
    with suppress(DataError):
        assert decode_image(damage(png(1))).mode == "RGB"
