"""The service on a real Ray Serve: OpenAI's client, batches, cancellation, slow and greedy clients, dying replicas."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
import ray
from ray import serve

from anchor_service.serving.app import build
from anchor_service.serving.local import NAME, running
from shared.config import parse_section
from shared.errors import ConfigError
from shared.serve_config import ServeConfig, ServeFile
from tests.integration.cluster import free_ports
from tests.serving import QUESTION, chat, make_run, picture, serve_tree

LIMITS = {"requests": 12, "body_timeout_s": 1.0, "body_bytes": 200_000, "max_tokens": 2000, "n": 64}
LONG = {"temperature": 2.0, "n": 64, "max_tokens": 2000, "visual_latents": {"swap": "noise"}}
"""Answers that take a while: the toy anchors end theirs soon, but not all of 64 drawn from a flat distribution."""
WAIT_S = 60.0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = make_run(tmp_path_factory.mktemp("run"))
    return serve_tree(run, limits=LIMITS, access={"requests_per_minute": 100_000})


@pytest.fixture(scope="module")
def url(tree: dict[str, Any]) -> Iterator[str]:
    (port,) = free_ports(1)
    config = parse_section(ServeConfig, tree, "test")
    with running(ServeFile(config=config, host="127.0.0.1", port=port)) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def counters(url: str, deployment: str) -> dict[str, float]:
    """Of one replica, from the metrics."""
    found = {}
    for line in httpx2.get(f"{url}/metrics").text.splitlines():
        if line.startswith("visual_latents_replica{") and f'deployment="{deployment}"' in line:
            found[line.split('"')[1]] = float(line.rpartition(" ")[2])
    return found


def posted(url: str, bodies: Sequence[dict[str, Any]]) -> list[httpx2.Response]:
    """All at once."""

    async def post() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=WAIT_S) as client:
            return list(await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=b) for b in bodies)))

    return asyncio.run(post())


def wait_until_ready(url: str) -> float:
    """Seconds until generator and anchors answer again."""
    started = time.monotonic()
    while httpx2.get(f"{url}/readyz", timeout=30).status_code != 200:
        assert time.monotonic() - started < WAIT_S
        time.sleep(0.1)
    return time.monotonic() - started


def test_openai_s_client_works_unchanged(client: openai.OpenAI) -> None:
    messages: Any = chat()["messages"]
    asked = {"messages": messages, "temperature": 1.5, "seed": 3, "n": 2, "max_tokens": 6}
    whole = client.chat.completions.create(model="joint", logprobs=True, top_logprobs=3, **asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    for choice in whole.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert choice.message.content == " ".join(token.token for token in tokens)
        assert all(len(token.top_logprobs) == 3 for token in tokens)
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model="joint", stream=True, **asked):
        for part in chunk.choices:
            texts[part.index] += part.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert [model.id for model in client.models.list()] == ["A", "B", "joint"]
    with pytest.raises(openai.NotFoundError, match="there are A, B, joint"):
        client.chat.completions.create(model="C", messages=messages)


def test_requests_that_come_together_share_steps(url: str) -> None:
    image = picture(5)
    before = counters(url, "A")
    responses = posted(url, [chat(image=image, temperature=1.0, seed=i, max_tokens=16) for i in range(12)])
    assert [response.status_code for response in responses] == [200] * 12
    after = counters(url, "A")
    written = sum(response.json()["usage"]["completion_tokens"] for response in responses)
    tokens, steps = (after[name] - before[name] for name in ("tokens", "steps"))
    assert tokens >= written
    assert steps < tokens / 2, "several answers grow in each step"
    assert counters(url, "generator")["images"] >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_nobody_waits_for_are_computed_no_further(url: str, stream: bool) -> None:
    async def leave() -> None:
        async with httpx2.AsyncClient(timeout=WAIT_S) as http:
            body = chat(stream=stream, **LONG)
            asked = [asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body)) for _ in range(8)]
            while not (await asyncio.to_thread(counters, url, "A"))["waiting"]:
                assert not all(one.done() for one in asked)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    before = counters(url, "A")
    asyncio.run(leave())
    deadline = time.monotonic() + WAIT_S
    while (now := counters(url, "A"))["rows"] or now["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert now["cancelled"] > before["cancelled"]
    assert now["tokens"] - before["tokens"] < 8 * 64 * 2, "8 × 64 answers of a word or more, with its end, were asked"


def test_more_than_there_is_room_for_is_told_to_come_again(url: str) -> None:
    responses = posted(url, [chat(image=picture(i), **LONG) for i in range(40)])
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    refused = [response for response in responses if response.status_code == 429]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    assert "12 requests" in refused[0].json()["error"]["message"]
    assert posted(url, [chat()])[0].status_code == 200


def test_a_body_that_comes_too_slowly_or_is_too_large(url: str) -> None:
    place = urlsplit(url)
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    for length, status, code in ((1000, 408, "body_too_slow"), (10_000_000, 413, "body_too_large")):
        with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n{{".encode())
            answer = connection.recv(65536).decode()
            while "\r\n\r\n" not in answer or not answer.rstrip().endswith("}"):
                answer += connection.recv(65536).decode()
        assert answer.startswith(f"HTTP/1.1 {status}")
        assert json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["error"]["code"] == code
    assert httpx2.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize("deployment", ["anchor-A", "generator"])
def test_a_replica_s_death_loses_no_accepted_request(url: str, deployment: str) -> None:
    """Those that stream nothing yet are answered by its successor."""

    async def ask_while_it_dies() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=WAIT_S) as http:
            bodies = [chat(image=picture(100 + i), question=QUESTION, **LONG) for i in range(8)]
            asked = [asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body)) for body in bodies]
            await asyncio.sleep(0.1)
            kill_replica(deployment)
            return list(await asyncio.gather(*asked))

    responses = asyncio.run(ask_while_it_dies())
    assert [response.status_code for response in responses] == [200] * 8, [r.text for r in responses]
    assert wait_until_ready(url) < WAIT_S


def kill_replica(deployment: str) -> None:
    """End one replica's process, as if its machine had gone."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if f"#{deployment}#" in one["name"]]
    assert names, deployment
    ray.kill(ray.get_actor(names[0], namespace="serve"), no_restart=True)


def test_an_update_under_load_loses_no_request(url: str, tree: dict[str, Any]) -> None:
    """Every deployment is replaced; what a replica has accepted it finishes, what comes meanwhile waits."""

    async def ask_during_the_update() -> list[int]:
        updated = {**tree, "limits": {**LIMITS, "n": 8}}
        update = asyncio.create_task(asyncio.to_thread(serve.run, build(updated), name=NAME, route_prefix="/"))

        async def client(number: int) -> list[int]:
            statuses = []
            while not update.done():
                body = chat(image=picture(200 + number), temperature=2.0, n=8, max_tokens=2000)
                statuses.append((await http.post(f"{url}/v1/chat/completions", json=body)).status_code)
            return statuses

        async with httpx2.AsyncClient(timeout=WAIT_S) as http:
            statuses = [one for of_client in await asyncio.gather(*map(client, range(6))) for one in of_client]
        await update
        return statuses

    statuses = asyncio.run(ask_during_the_update())
    assert len(statuses) > 6
    assert set(statuses) == {200}
    assert "9 answers (n), more than 8" in posted(url, [chat(n=9)])[0].text, "the update has arrived"


def test_a_folder_that_is_no_run_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run folder; train first"):
        build(serve_tree(tmp_path / "nothing"))


def test_deployments_scale_drain_and_bound_their_queues(tree: dict[str, Any]) -> None:
    anchors = [{**anchor, "max_replicas": 3} for anchor in tree["anchors"]]
    limits = {**LIMITS, "request_timeout_s": 90.0}
    front = build({**tree, "anchors": anchors, "limits": limits})._bound_deployment
    generator, by_name = front.init_args[2:]
    configs = {name: app._bound_deployment._deployment_config for name, app in {**by_name, "g": generator}.items()}
    for config in (*configs.values(), front._deployment_config):
        assert config.graceful_shutdown_timeout_s == 90.0, "as long as a request may take"
        assert config.max_queued_requests > 0, "bounded"
        assert config.backpressure_config.status_code == 429
    scaling = configs["A"].autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert 1 <= scaling.target_ongoing_requests < configs["A"].max_ongoing_requests, "grows before its queue fills"
    assert configs["g"].autoscaling_config is None
