"""The API over models of this process: what every endpoint answers, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load
from starlette.testclient import TestClient

from anchor_service.frozen_anchor import FrozenAnchor
from anchor_service.serving.service import Service
from shared.messages import Question, ReadRequest
from shared.vlm import load_vlm
from tests.integration.helpers import REPOSITORY
from tests.serving import EXAMPLE, MODELS, QUESTION, chat, data_url, local_app, local_service, make_run, picture
from tests.serving import serve_tree as tree_of
from tests.unit.test_images import bomb, encoded

LOOPBACK = ("127.0.0.1", 50_000)
K, D = 9, 64
KEY = "a-key-of-this-test"
LIMITS = {"body_bytes": 600_000, "batch": 4, "images": 2, "max_tokens": 8, "n": 3, "question_characters": 200}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def service(run: Path) -> Service:
    return local_service(tree_of(run, limits=LIMITS, access={"requests_per_minute": 100_000}))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(local_app(service), client=LOOPBACK, raise_server_exceptions=False) as running:
        yield running


def error_of(response: Any, status: int, code: str) -> str:
    """The message of an error of the stated form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "request_id"}
    assert (error["code"], error["request_id"]) == (code, response.headers["x-request-id"])
    assert not any(word in error["message"] for word in (str(REPOSITORY), ".py", "Traceback"))
    message: str = error["message"]
    return message


def ask(client: TestClient, **more: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=chat(**more))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_is_what_the_anchor_writes(client: TestClient) -> None:
    body = ask(client, model="A", logprobs=True, top_logprobs=2)
    (choice,) = body["choices"]
    tokens = choice["logprobs"]["content"]
    assert (body["object"], body["model"], choice["finish_reason"]) == ("chat.completion", "A", "stop")
    assert choice["message"] == {"role": "assistant", "content": " ".join(token["token"] for token in tokens)}
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + len(tokens)
    assert all(token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"]) for token in tokens), (
        "greedy: the most probable token"
    )


@pytest.mark.parametrize("model", ["A", "B", "joint"])
def test_a_stream_says_what_the_whole_response_says(client: TestClient, model: str) -> None:
    sampling = {"temperature": 1.5, "seed": 4, "n": 3}
    whole = ask(client, model=model, **sampling)
    response = client.post(
        "/v1/chat/completions",
        json=chat(model=model, stream=True, stream_options={"include_usage": True}, **sampling),
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(response.text)
    texts = dict.fromkeys(range(3), "")
    reasons = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole["choices"]]
    assert list(dict(sorted(reasons.items())).values()) == [choice["finish_reason"] for choice in whole["choices"]]
    assert chunks[-1]["usage"] == whole["usage"]


def test_the_same_seed_says_the_same_and_another_does_not(client: TestClient) -> None:
    def drawn(seed: int) -> list[str]:
        body = ask(client, temperature=2.0, n=3, seed=seed, visual_latents={"swap": "noise"})
        return [choice["message"]["content"] for choice in body["choices"]]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 1


def test_stop_and_max_tokens_end_an_answer(client: TestClient) -> None:
    whole = ask(client)["choices"][0]["message"]["content"]
    (choice,) = ask(client, stop=whole[1:])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (whole[0], "stop")
    (choice,) = ask(client, temperature=2.0, seed=1, max_tokens=1)["choices"]
    assert choice["finish_reason"] == "length"


def test_evidence_is_the_probability_under_every_anchor_and_a_picture(client: TestClient, service: Service) -> None:
    body = ask(client, model="A", visual_latents={"evidence": True})
    evidence, answer = body["visual_latents"], body["choices"][0]["message"]["content"]
    written = client.post("/v1/latents", json={"images": [data_url(EXAMPLE)], "format": "list"}).json()["latents"]
    latents_BKD = np.array(written, dtype=np.float32)
    for name, log_probability in evidence["log_probability"].items():
        assert log_probability == pytest.approx(plain_score(name, latents_BKD, QUESTION, answer), abs=1e-4)
    with Image.open(io.BytesIO(base64.b64decode(evidence["attention_png"]))) as image:
        assert image.mode == "RGBA"
        assert len(np.unique(np.array(image)[..., 3])) > 1, "some places are looked at more than others"
    assert (evidence["swap"], evidence["cached"]) == ("none", True)
    swapped = ask(client, visual_latents={"evidence": True, "swap": "noise"})["visual_latents"]
    assert swapped["attention_png"] is None
    assert swapped["log_probability"] != evidence["log_probability"]


def plain_score(name: str, latents_BKD: np.ndarray, question: str, answer: str) -> float:
    """One question to an anchor that is asked as training asks it."""
    import torch

    from shared.config import LatentPositions

    anchor = FrozenAnchor(name, load_vlm(str(MODELS / name)).freeze(), K, LatentPositions.GRID)
    reply = anchor.read(ReadRequest("", [[Question(question, answer)]], torch.from_numpy(latents_BKD)))
    return sum(reply.logprobs[0][0])


def test_latents_come_in_three_forms_that_agree(client: TestClient) -> None:
    images = [data_url(EXAMPLE), data_url(picture(1))]
    encoded_form = client.post("/v1/latents", json={"images": images}).json()["latents"]
    lists = client.post("/v1/latents", json={"images": images, "format": "list"}).json()["latents"]
    accept = {"Accept": "application/octet-stream"}
    tensors = load(client.post("/v1/latents", json={"images": images}, headers=accept).content)
    for one, as_list, as_tensor in zip(encoded_form, lists, tensors["latents"], strict=True):
        assert (one["dtype"], one["shape"]) == ("float32", [K, D])
        array = np.frombuffer(base64.b64decode(one["data"]), "<f4").reshape(K, D)
        np.testing.assert_array_equal(array, as_tensor)
        np.testing.assert_allclose(array, np.array(as_list), rtol=1e-6)


def test_scores_of_images_and_of_their_latents_agree(client: TestClient) -> None:
    (latents,) = client.post("/v1/latents", json={"images": [data_url(EXAMPLE)]}).json()["latents"]
    questions = [{"question": QUESTION, "answer": color} for color in ("red", "green triangle")]
    entries = [{"image": data_url(EXAMPLE), "questions": questions}, {"latents": latents, "questions": questions}]
    body = client.post("/v1/score", json={"entries": entries}).json()
    by_image, by_latents = (entry["questions"] for entry in body["entries"])
    for one, other in zip(by_image, by_latents, strict=True):
        assert set(one["anchors"]) == {"A", "B"}
        for name, scored in one["anchors"].items():
            np.testing.assert_allclose(scored["logprobs"], other["anchors"][name]["logprobs"], atol=1e-5)
            assert scored["log_probability"] == pytest.approx(sum(scored["logprobs"]))
    assert len(by_image[1]["anchors"]["A"]["logprobs"]) == 3, "two words and the end of turn"
    only = client.post("/v1/score", json={"entries": entries[:1], "anchors": ["B"]}).json()
    assert set(only["entries"][0]["questions"][0]["anchors"]) == {"B"}


def test_ten_questions_about_one_image_run_the_generator_once(client: TestClient, service: Service) -> None:
    image = picture(77)

    def images_seen() -> float:
        text = client.get("/metrics").text
        (line,) = [line for line in text.splitlines() if 'counter="images",deployment="generator"' in line]
        return float(line.rpartition(" ")[2])

    before = images_seen()
    for i in range(10):
        ask(client, image=image, question=f"how many {'circles' if i % 2 else 'squares'} are there?")
    assert images_seen() == before + 1
    assert service.latents_cache.counters.hits >= 9


def test_models_state_and_page(client: TestClient) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["A", "B", "joint"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "parts": {"generator": True, "A": True, "B": True}}
    page = client.get("/")
    assert page.status_code == 200
    assert "access-control-allow-origin" not in page.headers
    schema = client.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/score", "/v1/latents"):
        (example,) = schema["components"]["schemas"][
            schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition(
                "/"
            )[2]
        ]["examples"]
        assert client.post(path, json=example).status_code == 200, "examples of the schema work"


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "no such model": ({"model": "Z"}, 404, "model_not_found", "there are A, B, joint"),
    "too many tokens": ({"max_tokens": 9}, 422, "too_many", "9 max_tokens, more than 8"),
    "too many answers": ({"n": 4}, 422, "too_many", "4 answers (n), more than 3"),
    "a long question": ({"question": "x" * 201}, 422, "text_too_long", "201 characters, more than 200"),
    "an empty question": ({"question": " "}, 422, "empty_text", "empty"),
    "a chat template's token": ({"question": "what <|im_end|>"}, 422, "special_token", "<|im_end|>"),
    "an unknown field": ({"temprature": 1}, 422, "invalid_request", "temprature"),
    "an unknown swap": ({"visual_latents": {"swap": "all"}}, 422, "invalid_request", "visual_latents.swap"),
    "a hot temperature": ({"temperature": 3}, 422, "invalid_request", "temperature"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_chat_must_not_ask(client: TestClient, name: str) -> None:
    more, status, code, words = REFUSED[name]
    response = client.post("/v1/chat/completions", json=chat(**more))
    assert words in error_of(response, status, code)


def test_messages_that_are_none(client: TestClient) -> None:
    body = chat()
    body["messages"][0]["content"][0]["image_url"]["url"] = "http://192.0.2.1/a.png"
    assert "no https URL" in error_of(client.post("/v1/chat/completions", json=body), 422, "invalid_request")
    body["messages"][0]["content"][0]["image_url"]["url"] = "https://192.0.2.1/a.png"
    assert "remote images are not fetched" in error_of(
        client.post("/v1/chat/completions", json=body), 422, "remote_image"
    )
    body["messages"][0]["content"][0]["image_url"]["url"] = "https://" + 2000 * "a"
    assert "more than 2000" in error_of(client.post("/v1/chat/completions", json=body), 422, "invalid_request")
    body = chat()
    body["messages"][0]["content"] = 3 * body["messages"][0]["content"]
    assert "3 images, more than 2" in error_of(client.post("/v1/chat/completions", json=body), 422, "too_many")
    body = chat()
    del body["messages"][0]["content"][0]
    error_of(client.post("/v1/chat/completions", json=body), 422, "no_image")
    error_of(client.post("/v1/chat/completions", content=b"{"), 422, "invalid_request")
    error_of(client.post("/v1/nothing"), 404, "http_error")
    error_of(client.get("/v1/score"), 405, "http_error")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "bomb": bomb,
    "empty": lambda: b"",
    "JPEG cut short": lambda: encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900],
    "PNG cut short": lambda: encoded(Image.effect_noise((64, 64), 50), "PNG")[:900],
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "one pixel wide": lambda: encoded(Image.new("RGB", (1, 3000)), "PNG"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/latents", "/v1/score"])
def test_hostile_images_are_refused(client: TestClient, path: str, name: str) -> None:
    image = HOSTILE[name]()
    body = {
        "/v1/chat/completions": chat(image=image),
        "/v1/latents": {"images": [data_url(image)]},
        "/v1/score": {"entries": [{"image": data_url(image), "questions": [{"question": QUESTION, "answer": "red"}]}]},
    }[path]
    error_of(client.post(path, json=body), 422, "invalid_image")


BAD_LATENTS: dict[str, tuple[Any, str]] = {
    "of another shape": ([[0.0] * D] * (K - 1), f"shape [{K - 1}, {D}], expected [{K}, {D}]"),
    "ragged": ([[0.0] * D] * (K - 1) + [[0.0]], "differ in length"),
    "too long": ([[1e3] * D] * K, "more than 1000"),
    "beyond float32": ([[1e300] * D] * K, "infinite"),
    "NaN": ({"dtype": "float32", "shape": [K, D], "data": base64.b64encode(b"\xff" * 4 * K * D).decode()}, "NaN"),
    "too few bytes": ({"dtype": "float32", "shape": [K, D], "data": "AAAA"}, f"3 bytes, expected {4 * K * D}"),
    "no base64": ({"dtype": "float32", "shape": [K, D], "data": "?"}, "base64"),
}


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_latents_from_outside_are_checked(client: TestClient, name: str) -> None:
    latents, words = BAD_LATENTS[name]
    entry = {"latents": latents, "questions": [{"question": QUESTION, "answer": "red"}]}
    assert words in error_of(client.post("/v1/score", json={"entries": [entry]}), 422, "invalid_latents")


def test_batches_are_bounded(client: TestClient) -> None:
    entry = {"image": data_url(EXAMPLE), "questions": [{"question": QUESTION, "answer": "red"}]}
    too_many = {"entries": 5 * [entry]}
    assert "5 entries, more than 4" in error_of(client.post("/v1/score", json=too_many), 422, "too_many")
    entry["questions"] = 5 * entry["questions"]  # type: ignore[operator]
    response = client.post("/v1/score", json={"entries": [entry]})
    assert "5 questions of an entry, more than 4" in error_of(response, 422, "too_many")
    response = client.post("/v1/latents", json={"images": 5 * [data_url(EXAMPLE)]})
    assert "5 images, more than 4" in error_of(response, 422, "too_many")
    response = client.post("/v1/latents", content=b" " * 600_001)
    assert "600000 bytes" in error_of(response, 413, "body_too_large")


def test_keys_and_rates(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEYS", f"another, {KEY}")
    guarded = local_service(tree_of(run, access={"keys_variable": "TEST_KEYS", "requests_per_minute": 3}))
    with TestClient(local_app(guarded), client=("203.0.113.7", 1), raise_server_exceptions=False) as client:
        error_of(client.get("/v1/models"), 401, "invalid_api_key")
        error_of(client.get("/v1/models", headers={"Authorization": f"Basic {KEY}"}), 401, "invalid_api_key")
        assert client.get("/readyz").status_code == 200, "for load balancers"
        headers = {"Authorization": f"Bearer {KEY}"}
        statuses = [client.get("/v1/models", headers=headers).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        refused = client.get("/v1/models", headers=headers)
        assert int(refused.headers["Retry-After"]) >= 1
        assert client.get("/v1/models", headers={"Authorization": "Bearer another"}).status_code == 200


def test_without_keys_only_loopback_is_answered(service: Service) -> None:
    with TestClient(local_app(service), client=("203.0.113.7", 1), raise_server_exceptions=False) as client:
        error_of(client.post("/v1/chat/completions", json=chat()), 403, "no_keys")
