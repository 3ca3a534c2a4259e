"""No request brings the API to a 5xx: everything its schema allows, and ten thousand bodies that were damaged."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from tests.serving import EXAMPLE, QUESTION, data_url, local_app, local_service, make_run, serve_tree

LOOPBACK = ("127.0.0.1", 50_000)
K, D = 9, 64
N_MUTATED = 5_000
"""Of each of the two endpoints."""
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
MEANT = {200, 400, 404, 413, 422}
ODD = (None, True, -1, 0, 1e308, 2**70, "", "x" * 300, [], {}, [[]], "data:image/png;base64,AAAA", "\ud800", "NaN")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    limits = {"max_tokens": 4, "batch": 4, "question_characters": 200, "body_bytes": 100_000}
    access = {"requests_per_minute": 10_000_000}
    service = local_service(serve_tree(make_run(tmp_path_factory.mktemp("run")), limits=limits, access=access))
    logging.disable(logging.INFO)
    with TestClient(local_app(service), client=LOOPBACK, raise_server_exceptions=False) as running:
        yield running
    logging.disable(logging.NOTSET)


def bodies() -> dict[str, Any]:
    """A good body of each endpoint."""
    data = base64.b64encode(np.ones((K, D), "<f4").tobytes()).decode()
    latents = {"dtype": "float32", "shape": [K, D], "data": data}
    questions = [{"question": QUESTION, "answer": "red"}]
    return {
        "/v1/latents": {"images": [data_url(EXAMPLE)], "format": "base64"},
        "/v1/score": {
            "entries": [{"latents": latents, "questions": questions}, {"image": data_url(EXAMPLE), "questions": []}],
            "anchors": ["A"],
        },
    }


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be put instead of what is there."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path] * bool(path) + [place for key, one in inner for place in places_of(one, (*path, key))]


def damaged(body: Any, rng: np.random.Generator) -> bytes:
    """One or two values replaced, removed or renamed, or the bytes themselves changed."""
    copy = json.loads(json.dumps(body))
    for _ in range(rng.integers(1, 3)):
        places = places_of(copy)
        if not places:
            break
        *way, last = places[rng.integers(len(places))]
        holder = copy
        for step in way:
            holder = holder[step]
        match rng.integers(4):
            case 0:
                holder[last] = ODD[rng.integers(len(ODD))]
            case 1:
                del holder[last]
            case 2 if isinstance(holder, dict):
                holder[str(last) + "s"] = holder.pop(last)
            case _ if isinstance(holder[last], str):
                characters = list(holder[last])
                for i in rng.integers(0, max(1, len(characters)), 3):
                    characters[i : i + 1] = chr(int(rng.integers(0x2FF)))
                holder[last] = "".join(characters)
    raw = bytearray(json.dumps(copy).encode())
    if rng.random() < 0.2:
        for i in rng.integers(0, len(raw), 4):
            raw[i] = rng.integers(256)
    return bytes(raw)


@pytest.mark.parametrize("path", ["/v1/latents", "/v1/score"])
def test_damaged_bodies_are_refused_or_answered(client: TestClient, path: str) -> None:
    rng = np.random.default_rng(7)
    body = bodies()[path]
    body = {**body, "entries": [body["entries"][0]]} if path == "/v1/score" else body
    statuses: dict[int, int] = {}
    for _ in range(N_MUTATED):
        response = client.post(path, content=damaged(body, rng), headers={"Content-Type": "application/json"})
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in MEANT, response.text
        if response.status_code != 200:
            assert response.json()["error"]["message"]
    assert statuses[422] > N_MUTATED / 2
    assert statuses.get(200, 0) > 0, "some damage does not matter"


def test_the_schema_holds_and_nothing_it_allows_is_a_server_error(client: TestClient) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @schemathesis_given(operation)
        def check(case: Any) -> None:
            response = client.request(
                case.method,
                case.formatted_path,
                headers={str(k): str(v) for k, v in (case.headers or {}).items()},
                **({} if case.body.__class__.__name__ == "NotSet" else {"json": case.body}),
            )
            assert response.status_code < 500, (case, response.text)
            case.validate_response(schemathesis.Response.from_any(response), checks=CHECKS)

        check()


def schemathesis_given(operation: Any) -> Any:
    """The decorator that hands a test the cases of an operation."""
    from hypothesis import given

    return given(case=operation.as_strategy())
