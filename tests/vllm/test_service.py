"""The service with one anchor on vLLM, in an environment of its own: the answers of the service without."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from anchor_service.export import export_anchor
from anchor_service.serving.app import build
from anchor_service.serving.local import running
from shared.config import load_config, parse_section
from shared.errors import ConfigError
from shared.serve_config import ServeConfig, ServeFile
from tests.integration.cluster import free_ports
from tests.serving import chat, local_app, local_service, make_run, picture, serve_tree
from tests.vllm.test_parity import PYTHON

COLORS = ("red", "green", "blue", "yellow")


def test_an_anchor_on_vllm_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "VLLM_CPU_KVCACHE_SPACE", "1")
    run = make_run(tmp_path, "text")
    export_anchor(load_config(run / "config.yaml", []), "A", tmp_path / "A")
    tree = serve_tree(run)
    plain = local_service(tree)
    tree["anchors"][0]["vllm"] = {"exported": str(tmp_path / "A"), "python": str(PYTHON.absolute())}
    bodies = [
        chat(image=picture(i), question=f"is there a {color} circle?", model="A", logprobs=True, top_logprobs=3)
        for i, color in enumerate(COLORS)
    ]
    with TestClient(local_app(plain), client=("127.0.0.1", 1)) as client:
        expected = [client.post("/v1/chat/completions", json=body).json() for body in bodies]
    file = ServeFile(config=parse_section(ServeConfig, tree, "test"), host="127.0.0.1", port=free_ports(1)[0])
    with running(file) as url, httpx2.Client(base_url=url, timeout=300) as http:
        told = [http.post("/v1/chat/completions", json=body).json() for body in bodies]
        streamed = http.post("/v1/chat/completions", json={**bodies[0], "stream": True}).text
        evidence = {**bodies[0], "visual_latents": {"evidence": True}}
        scored = http.post("/v1/chat/completions", json=evidence).json()["visual_latents"]["log_probability"]
    for one, other in zip(told, expected, strict=True):
        assert one["choices"][0]["message"] == other["choices"][0]["message"]
        assert one["usage"] == other["usage"]
        pairs = zip(one["choices"][0]["logprobs"]["content"], other["choices"][0]["logprobs"]["content"], strict=True)
        for token, same in pairs:
            assert token["logprob"] == pytest.approx(same["logprob"], abs=1e-4)
    assert streamed.endswith("data: [DONE]\n\n")
    assert set(scored) == {"A", "B"}


def test_latents_on_a_grid_are_refused(tmp_path: Path) -> None:
    tree = serve_tree(make_run(tmp_path))
    tree["anchors"][0]["vllm"] = {"exported": str(tmp_path), "python": str(PYTHON)}
    with pytest.raises(ConfigError, match="latent_positions: text"):
        build(tree)
