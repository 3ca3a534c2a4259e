"""The service under load on loopback, beside its engine called directly (`make bench-serve`).

The service runs in processes of its own (`python -m anchor_service serve`, toy anchors A and B, a run of two steps:
what the answers say does not matter here). Clients ask again as soon as they are answered, over kept-alive connections.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
import yaml

from anchor_service.serving.engine import Engine, Job
from anchor_service.serving.reader import AnchorReader
from anchor_service.serving.sampling import Sampling
from shared.config import parse_section
from shared.packing import Media
from shared.run_folder import run_config
from shared.serve_config import ServeConfig
from shared.vlm import load_vlm
from tests.benchmarks.results import Result, record
from tests.integration.cluster import free_ports
from tests.serving import MODELS, QUESTION, chat, make_run, picture, serve_tree

COMMAND = "make bench-serve"
CLIENTS = (1, 8, 32, 64)
OVERHEAD_CLIENTS, BATCHING_CLIENTS = 8, 32
ROOM = 64
LATENTS = (1, 4, 16, 64)
N_IMAGES = 16
START_LIMIT_S = 240
REPLICAS = "SERVE_REPLICA::visual-latents"
LONG = {"temperature": 2.0, "max_tokens": 64, "visual_latents": {"swap": "noise"}}
"""Many words: an answer drawn from a flat distribution ends late."""
Ask = Callable[[int], Awaitable[int]]


@dataclass
class Load:
    """What clients saw. seconds: of answers with status 200; refused_s: of those with 429."""

    duration_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.duration_s

    def percentile_ms(self, percent: float) -> float:
        """Of answers."""
        return 1e3 * float(np.percentile(self.seconds, percent))


@contextlib.contextmanager
def serving(folder: Path, run: Path, **sections: Any) -> Iterator[str]:
    """The service with these sections of its config; its URL."""
    (port,) = free_ports(1)
    limits = {"requests": ROOM, "max_tokens": 64}
    tree = serve_tree(run, limits=limits, access={"requests_per_minute": 10_000_000}, **sections)
    file = folder / f"serve-{port}.yaml"
    http = {"host": "127.0.0.1", "port": port}
    file.write_text(yaml.safe_dump({"http_options": http, "applications": [{"args": tree}]}))
    with file.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "anchor_service", "serve", "--config", str(file)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, file.with_suffix(".log"))
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises AssertionError with the log if it does not become ready."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]  # noqa: PT018
        time.sleep(0.2)


async def offered(ask: Ask, n_clients: int, duration_s: float) -> Load:
    """Load of clients that ask one question after the other."""
    load = Load()
    end = time.perf_counter() + duration_s

    async def client(number: int) -> None:
        while (started := time.perf_counter()) < end:
            status = await ask(number)
            seconds = time.perf_counter() - started
            load.statuses[status] += 1
            (load.seconds if status == 200 else load.refused_s).append(seconds)
            number += n_clients

    started = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(n_clients)))
    load.duration_s = time.perf_counter() - started
    return load


def load_of(url: str, n_clients: int, duration_s: float, **more: Any) -> Load:
    """Over HTTP, about N_IMAGES images in turn."""
    bodies = [chat(image=picture(i), **more) for i in range(N_IMAGES)]

    async def go() -> Load:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(limits=limits, timeout=120) as http:

            async def ask(number: int) -> int:
                try:
                    body = bodies[number % N_IMAGES]
                    return (await http.post(f"{url}/v1/chat/completions", json=body)).status_code
                except httpx2.HTTPError:
                    return 0

            return await offered(ask, n_clients, duration_s)

    load = asyncio.run(go())
    print(f"{n_clients} clients: {load.per_second:.0f} answers/s, {dict(load.statuses)}", file=sys.stderr, flush=True)
    return load


def direct_load(run: Path, n_clients: int, duration_s: float, **sampling: Any) -> Load:
    """The same anchor's engine in this process."""
    config = parse_section(ServeConfig, serve_tree(run), "bench")
    reader = AnchorReader(config.anchors[0], run_config(run), config.engine, config.batch_requests, "cpu")
    latents_KD = np.random.default_rng(0).standard_normal((run_config(run).generator.latents, 64)).astype(np.float32)
    jobs = [Job(f"{i}", latents_KD * (i + 1), QUESTION, Sampling(**sampling)) for i in range(N_IMAGES)]

    async def ask(number: int) -> int:
        async for _ in reader.generate(jobs[number % N_IMAGES]):
            pass
        return 200

    return asyncio.run(offered(ask, n_clients, duration_s))


def bounded(figure: str, value: float, unit: str, bar: str, met: bool | None, n: int) -> Result:
    """A figure without repetitions."""
    return Result(f"service, {figure}", value, unit, bar, met, None, None, n, COMMAND)


def throughput_rows(url: str, duration_s: float) -> tuple[list[Result], dict[int, Load]]:
    """At each number of clients."""
    loads = {n: load_of(url, n, duration_s) for n in CLIENTS}
    rows = []
    for n, load in loads.items():
        rows.append(bounded(f"{n} clients: throughput", load.per_second, "answers/s", "–", None, len(load.seconds)))
        for percent in (50, 95, 99):
            latency = load.percentile_ms(percent)
            rows.append(bounded(f"{n} clients: p{percent}", latency, "ms", "–", None, len(load.seconds)))
    return rows, loads


def first_token_rows(url: str) -> list[Result]:
    """Of a second question about an image against the first."""

    def first_token_s(image: bytes, question: str) -> float:
        started = time.perf_counter()
        body = chat(image=image, question=question, stream=True)
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    return time.perf_counter() - started
        return time.perf_counter() - started

    pairs = []
    for i in range(30):
        image = picture(1000 + i)
        first = first_token_s(image, QUESTION)
        pairs.append((first, first_token_s(image, "how many things are there?")))
    first_s, second_s = np.median(np.array(pairs), axis=0)
    ratios = np.array([second / first for first, second in pairs])
    unit = "second question about an image / first, median (quartiles)"
    low, high = np.percentile(ratios, [25, 75])
    return [
        bounded("time to first token, new image", 1e3 * first_s, "ms", "–", None, len(pairs)),
        bounded("time to first token, cached image", 1e3 * second_s, "ms", "–", None, len(pairs)),
        Result(
            "service, time to first token: ratio", float(np.median(ratios)), unit, "–", None, low, high, 30, COMMAND
        ),
    ]


def latents_rows() -> list[Result]:
    """What K latents cost the anchor: seconds of one request alone, and bytes of keys and values."""
    model = load_vlm(str(MODELS / "A")).freeze()
    config = model.hf_model.config.get_text_config()
    per_token = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    times: dict[int, list[float]] = {k: [] for k in LATENTS}
    for _ in range(40):
        for k in LATENTS:
            engine = Engine(model, Media(k), 1)
            latents_KD = torch.randn(k, model.width).numpy()
            started = time.perf_counter()
            engine.add(Job("image", latents_KD, QUESTION, Sampling(max_tokens=8)))
            while not engine.is_idle:
                engine.step()
            times[k].append(time.perf_counter() - started)
    rows = []
    for k in LATENTS:
        low, median, high = 1e3 * np.percentile(times[k][5:], [25, 50, 75])
        figure = f"service, K = {k}: one request on the engine"
        rows.append(Result(figure, median, "ms, median (quartiles)", "–", None, low, high, 35, COMMAND))
        rows.append(bounded(f"K = {k}: keys and values of the latents", k * per_token / 1024, "KiB", "–", None, 1))
    return rows


def overload_rows(url: str, duration_s: float) -> list[Result]:
    """Four times as many clients as there is room for."""
    load = load_of(url, 4 * ROOM, duration_s, **LONG)
    refused = 1.0 if not load.refused_s else float(np.percentile(load.refused_s, 99))
    only = set(load.statuses) <= {200, 429}
    after = load_of(url, 8, 3.0)
    recovered = set(after.statuses) == {200}
    return [
        bounded("4 × overload: p99 of a 429", refused, "s", "≤ 1 s", refused <= 1 and only, len(load.refused_s)),
        bounded("after overload: all answered", float(recovered), "1: yes", "1", recovered, len(after.seconds)),
    ]


def soak_rows(url: str, minutes: float) -> list[Result]:
    """Eight clients while an anchor's replica is killed every minute."""
    load = Load()
    memory: list[tuple[float, float]] = []
    started = time.monotonic()
    killed = 0
    while (elapsed_s := time.monotonic() - started) < 60 * minutes:
        part = load_of(url, 8, 10.0)
        load.seconds += part.seconds
        load.statuses += part.statuses
        if int((elapsed_s + 10) // 60) > killed:
            killed += 1
            victims = [p for p in psutil.process_iter(["cmdline"]) if f"{REPLICAS}#anchor-A#" in first_word(p)]
            victims[0].kill()
        else:
            memory.append((elapsed_s / 60, resident_mib(("#front#", "#generator#", "#anchor-B#"))))
    lost = sum(n for status, n in load.statuses.items() if status not in (200, 429))
    slope = float(np.polyfit(*np.array(memory).T, 1)[0])
    return [
        bounded(
            f"soak {minutes:g} min, {killed} kills: requests lost", lost, "requests", "0", lost == 0, len(load.seconds)
        ),
        bounded(f"soak {minutes:g} min: memory of what was not killed", slope, "MiB/min", "–", None, len(memory)),
        bounded(f"soak {minutes:g} min: p99", load.percentile_ms(99), "ms", "–", None, len(load.seconds)),
    ]


def first_word(process: psutil.Process) -> str:
    """Ray writes a worker's title there."""
    return (process.info["cmdline"] or [""])[0]


def resident_mib(names: Sequence[str]) -> float:
    """Of the service's replicas with these names."""
    found = [p for p in psutil.process_iter(["cmdline"]) if REPLICAS in first_word(p)]
    return sum(p.memory_info().rss for p in found if any(name in first_word(p) for name in names)) / 2**20


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="Of load for each figure.")
    parser.add_argument("--soak-minutes", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder)
        rows = latents_rows()
        with serving(folder, run) as url:
            load_of(url, 8, 3.0)
            throughput, loads = throughput_rows(url, options.seconds)
            long = load_of(url, BATCHING_CLIENTS, options.seconds, **LONG)
            rows += [*throughput, *first_token_rows(url), *overload_rows(url, options.seconds)]
            rows += soak_rows(url, options.soak_minutes)
        with serving(folder, run, engine={"rows": 1}, batch_requests=1) as url:
            load_of(url, 8, 3.0)
            plain = load_of(url, BATCHING_CLIENTS, options.seconds)
            plain_long = load_of(url, BATCHING_CLIENTS, options.seconds, **LONG)
        direct = direct_load(run, OVERHEAD_CLIENTS, options.seconds, max_tokens=64)
        for label, ours, other in (("short", loads[BATCHING_CLIENTS], plain), ("long", long, plain_long)):
            ratio = ours.per_second / other.per_second
            figure = f"{BATCHING_CLIENTS} clients, {label} answers: batching / none"
            rows.append(bounded(figure, ratio, "× answers/s", "≥ 3", ratio >= 3, len(ours.seconds)))
        overhead = loads[OVERHEAD_CLIENTS].percentile_ms(50) / direct.percentile_ms(50)
        figure = f"{OVERHEAD_CLIENTS} clients: p50 over HTTP / engine called directly"
        rows.append(bounded(figure, overhead, "×", "≤ 1.25", overhead <= 1.25, len(direct.seconds)))
        rows.append(bounded("8 clients: p50 of the engine alone", direct.percentile_ms(50), "ms", "–", None, 1))
    record(rows)


if __name__ == "__main__":
    main()
