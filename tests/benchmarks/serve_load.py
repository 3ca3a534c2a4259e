"""The service under load on loopback, beside its engine called directly (`make bench-serve`, 20 minutes).

The service runs in processes of its own (`python -m anchor_service serve`, with a run of two training steps: what its
latents say does not matter here). The toy anchors A and B answer with one word, so what a request costs outside the
engine is nearly everything. The anchor "words" has A's shape and random weights, and is asked for 64 words: it seldom
draws the end of turn before, so the engine has something to do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from anchor_service.serving.engine import EndEvent, Engine, Job, TokenEvent
from anchor_service.serving.sampling import Sampling
from anchor_service.serving.schema import ChatRequest
from anchor_service.serving.service import Service
from shared.config import GeneratorConfig
from shared.images import decode_image
from shared.packing import Media
from shared.vlm import load_vlm
from shared.vlm.generator import Generator
from tests.benchmarks.results import Result, record
from tests.benchmarks.serve_client import Ask, Load, asking, closed_loop, http_load, open_loop
from tests.benchmarks.serve_process import Served, serving
from tests.serving import MODELS, QUESTION, chat, local_service, make_run, picture, serve_tree

COMMAND = "make bench-serve"
CLIENTS = (1, 8, 32, 64)
OVERHEAD_CLIENTS, BATCHING_CLIENTS, SOAK_CLIENTS = 8, 32, 8
ROOM = 64
N_IMAGES = 16
N_WORDS = 64
LATENTS = (0, 4, 16, 64)
OVERLOAD = 4
MOST_ARRIVALS = 5_000
VICTIMS = ("anchor-A", "generator")
"""Killed in turn."""
ANSWERS = ("one-word", f"{N_WORDS}-word")
WARM_UP_S = 3.0
ROUNDS = 5


def one_word(number: int) -> dict[str, Any]:
    """To a toy anchor, which answers with one word."""
    return chat(image=picture(number), model="A")


def many_words(number: int) -> dict[str, Any]:
    """To the anchor of random weights. Seeds make both sides of a comparison write the same."""
    return chat(image=picture(number), model="words", temperature=1.0, seed=number, max_tokens=N_WORDS)


BODIES = dict(zip(ANSWERS, (one_word, many_words), strict=True))


def write_wordy(folder: Path) -> str:
    """The model folder of A with random weights."""
    shutil.copytree(MODELS / "A", folder)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


def tree_of(run: Path, wordy: str, **sections: Any) -> dict[str, Any]:
    """Arguments of the application: anchors A, B and words. Nothing but a full service may say 429."""
    limits = {"requests": ROOM, "max_tokens": N_WORDS}
    access = {"requests_per_minute": 10_000_000}
    tree = serve_tree(run, limits=limits, access=access, cache_bytes=2**20, **sections)
    tree["anchors"].append({"name": "words", "model": wordy, "cpus": 0.25})
    return tree


def plain(figure: str, value: float, unit: str, n: int) -> Result:
    """A figure without bar and without repetitions."""
    return Result(f"service, {figure}", value, unit, "–", None, None, None, n, COMMAND)


def barred(figure: str, value: float, unit: str, bar: str, met: bool, n: int) -> Result:
    """A figure that has to reach something."""
    return Result(f"service, {figure}", value, unit, bar, met, None, None, n, COMMAND)


def quartiles(figure: str, values: list[float], unit: str) -> Result:
    """The median of repetitions."""
    low, median, high = map(float, np.percentile(values, [25, 50, 75]))
    return Result(
        f"service, {figure}", median, f"{unit}; median and quartiles", "–", None, low, high, len(values), COMMAND
    )


def loads_over_http(url: str, kind: str, clients: tuple[int, ...], duration_s: float) -> dict[int, Load]:
    """A closed loop at each number of clients, about N_IMAGES images in turn, after a warm-up."""
    http_load(url, BODIES[kind], N_IMAGES, max(clients), min(WARM_UP_S, duration_s))
    loads = {}
    for n in clients:
        loads[n] = http_load(url, BODIES[kind], N_IMAGES, n, duration_s)
        assert set(loads[n].statuses) == {200}, f"{n} clients: {dict(loads[n].statuses)}"
        say(f"{kind} answers, {n} clients: {loads[n].per_second:.0f}/s, p50 {loads[n].percentile_ms(50):.0f} ms")
    return loads


def throughput_rows(loads: dict[int, Load], kind: str) -> list[Result]:
    """Throughput and latencies at each number of clients."""
    rows = []
    for n, load in loads.items():
        name = f"{kind} answers, {n} clients"
        rows.append(plain(f"{name}: throughput", load.per_second, "answers/s", len(load.seconds)))
        rows += [plain(f"{name}: p{p}", load.percentile_ms(p), "ms", len(load.seconds)) for p in (50, 95, 99)]
    return rows


def batching_row(kind: str, batched: Load, alone: Load) -> Result:
    """Throughput with dynamic batches and continuous decoding over one request after the other."""
    ratio = batched.per_second / alone.per_second
    figure = f"{kind} answers, {BATCHING_CLIENTS} clients: batching / none"
    return barred(figure, ratio, "× answers/s", "≥ 3", ratio >= 3, len(batched.seconds))


def direct_load(service: Service, kind: str, duration_s: float) -> Load:
    """The same jobs on the engine of the same anchor in this process: no HTTP, no Serve, latents there already."""

    async def go() -> Load:
        answerings = [await service.prepare(ChatRequest(**BODIES[kind](i))) for i in range(N_IMAGES)]

        async def ask(number: int) -> int:
            async for _ in service.answer(answerings[number % N_IMAGES], replayable=True):
                pass
            return 200

        return await closed_loop(ask, OVERHEAD_CLIENTS, duration_s)

    return asyncio.run(go())


def overhead_rows(url: str, service: Service, kind: str, duration_s: float, rounds: int = ROUNDS) -> list[Result]:
    """Of HTTP and Serve over the engine: both in turn, ratios within a round. service: of the same config."""
    direct_ms, ratios = [], []
    for _ in range(rounds):
        direct_ms.append(direct_load(service, kind, duration_s / rounds).percentile_ms(50))
        over_http = http_load(url, BODIES[kind], N_IMAGES, OVERHEAD_CLIENTS, duration_s / rounds)
        ratios.append(over_http.percentile_ms(50) / direct_ms[-1])
    name = f"{kind} answers, {OVERHEAD_CLIENTS} clients"
    ratio = quartiles(f"{name}: p50 over HTTP / engine called directly", ratios, "×")
    assert ratio.value is not None
    return [
        quartiles(f"{name}: p50 of the engine called directly", direct_ms, "ms"),
        replace(ratio, bar="≤ 1.25", met=ratio.value <= 1.25),
    ]


def first_token_rows(url: str, n_images: int) -> list[Result]:
    """Time to the first token of a second question about an image against the first question."""

    def seconds(image: bytes, question: str) -> float:
        body = chat(image=image, question=question, stream=True)
        started = time.perf_counter()
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = [(line, time.perf_counter()) for line in stream.iter_lines()]
        arrived = [at for line, at in lines if '"content":"' in line and '"content":""' not in line]
        return arrived[0] - started

    with httpx2.Client(base_url=url, timeout=60) as http:
        images = [picture(1000 + i) for i in range(n_images)]
        pairs = [(seconds(one, QUESTION), seconds(one, "what color is the circle?")) for one in images]
    return [
        quartiles("time to first token, new image", [1e3 * first for first, _ in pairs], "ms"),
        quartiles("time to first token, cached image", [1e3 * second for _, second in pairs], "ms"),
        quartiles("time to first token, cached / new image", [b / a for a, b in pairs], "× within an image"),
    ]


def latents_rows(wordy: str, repetitions: int) -> list[Result]:
    """What K latents cost a request alone: on the generator, on the anchor's engine, as keys and values there.

    K = 0 is the question alone: the generator writes nothing.
    """
    model = load_vlm(wordy).freeze()
    sizes = model.hf_model.config.get_text_config()
    head_width = sizes.hidden_size // sizes.num_attention_heads
    per_token = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * head_width * model.dtype.itemsize
    generators = {
        k: Generator(GeneratorConfig(model=str(MODELS / "A"), latents=k, device="cpu"), 0) for k in LATENTS[1:]
    }
    image = decode_image(picture(0), 10_000)
    costs: dict[int, list[RequestCost]] = {k: [] for k in LATENTS}
    for repetition in range(-1, repetitions):
        for k in LATENTS if repetition % 2 else reversed(LATENTS):
            written_s = seconds_to_write(generators[k], image) if k else 0.0
            cost = request_cost(Engine(model, Media(k), 1), k, written_s)
            costs[k] += [cost] if repetition >= 0 else []
    rows = []
    for k, one in costs.items():
        kib = one[0].prompt_tokens * per_token / 1024
        rows += [
            quartiles(f"K = {k}: latents of an image written", [1e3 * c.written_s for c in one], "ms"),
            quartiles(f"K = {k}: first token on the engine", [1e3 * c.first_s for c in one], "ms"),
            quartiles(f"K = {k}: every further token", [1e3 * c.further_s for c in one], "ms"),
            plain(f"K = {k}: keys and values when the answer begins", kib, "KiB per request", 1),
        ]
    return rows


@dataclass(frozen=True)
class RequestCost:
    """Of one request alone."""

    written_s: float
    first_s: float
    further_s: float
    prompt_tokens: int


@torch.no_grad()
def seconds_to_write(generator: Generator, image: Any) -> float:
    """From decoded image to latents."""
    started = time.perf_counter()
    generator.emit(generator.image_tokens_from(generator.model.image_inputs([image])))
    return time.perf_counter() - started


def request_cost(engine: Engine, k: int, written_s: float) -> RequestCost:
    """The same draws for every K, so that about as many tokens are written."""
    latents_KD = np.random.default_rng(0).standard_normal((k, engine.model.width)).astype(np.float32)
    engine.add(Job("image", latents_KD, QUESTION, Sampling(max_tokens=16, temperature=1.0, seed=1)))
    times = [time.perf_counter()]
    events = []
    while not engine.is_idle:
        events += [event for _, event in engine.step()]
        times.append(time.perf_counter())
    (end,) = [event for event in events if isinstance(event, EndEvent)]
    assert sum(isinstance(event, TokenEvent) for event in events) > 1
    # The first token's step also reads its own column; that belongs to the second token, and is as long as any other.
    return RequestCost(written_s, times[1] - times[0], float(np.median(np.diff(times)[1:])), end.prompt_tokens)


def overload_rows(url: str, capacity: float, duration_s: float) -> list[Result]:
    """An open loop at OVERLOAD × capacity (answers/s), then whether everybody is answered again."""

    async def go() -> tuple[Load, float]:
        async with asking(url, many_words, N_IMAGES) as ask:
            return await open_loop(ask, OVERLOAD * capacity, duration_s, MOST_ARRIVALS)

    load, arrived = asyncio.run(go())
    say(f"overload: {arrived:.0f} arrivals/s, {dict(load.statuses)}")
    p99_s = float(np.percentile(load.refused_s, 99)) if load.refused_s else float("nan")
    is_quick = p99_s <= 1 and load.n_lost == 0
    after = http_load(url, many_words, N_IMAGES, OVERHEAD_CLIENTS, min(3.0, duration_s))
    recovered = set(after.statuses) == {200}
    name = f"{OVERLOAD} × overload"
    n = sum(load.statuses.values())
    return [
        plain(f"{name}: arrivals / capacity", arrived / capacity, "×", n),
        plain(f"{name}: answered / capacity", load.per_second / capacity, "×", len(load.seconds)),
        barred(f"{name}: p99 of a 429", p99_s, "s", "≤ 1, nothing but 200 and 429", is_quick, len(load.refused_s)),
        barred(f"after {name}: all answered", float(recovered), "1: yes", "1", recovered, len(after.seconds)),
    ]


@dataclass
class Soak:
    """memory: (minute, MiB of what is not killed). back_s: from each kill until the service was ready again."""

    load: Load
    memory: list[tuple[float, float]] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)


async def soaked(served: Served, minutes: float, kill_every_s: float, sample_every_s: float) -> Soak:
    """Clients ask, every tenth time about a new image, while a replica dies every so often in the middle of it."""

    def body_of(number: int) -> dict[str, Any]:
        return chat(image=picture(10_000 + number // 10), model="AB"[number % 2])

    async def watch() -> AsyncIterator[float]:
        while (elapsed_s := time.monotonic() - started) < 60 * minutes:
            yield elapsed_s
            await asyncio.sleep(sample_every_s)

    async def ask_all_along(ask: Ask) -> None:
        soak.load = await closed_loop(ask, SOAK_CLIENTS, 60 * minutes)

    soak, started, victims = Soak(Load()), time.monotonic(), itertools.cycle(VICTIMS)
    next_kill_s = kill_every_s / 2
    async with asking(served.url, body_of) as ask, asyncio.TaskGroup() as group:
        group.create_task(ask_all_along(ask))
        async for elapsed_s in watch():
            soak.memory.append((elapsed_s / 60, served.memory_mib(without=VICTIMS)))
            if elapsed_s < next_kill_s:
                continue
            next_kill_s += kill_every_s
            served.replica(next(victims)).kill()
            killed = time.monotonic()
            while not await asyncio.to_thread(served.is_ready):
                await asyncio.sleep(0.2)
            soak.back_s.append(time.monotonic() - killed)
    return soak


def soak_rows(served: Served, minutes: float, kill_every_s: float = 60.0, sample_every_s: float = 5.0) -> list[Result]:
    """Nothing accepted is lost, memory stays, the service comes back by itself."""
    soak = asyncio.run(soaked(served, minutes, kill_every_s, sample_every_s))
    load = soak.load
    say(f"soak: {load.per_second:.0f}/s, {dict(load.statuses)}, back after {[round(s, 1) for s in soak.back_s]} s")
    # The first quarter fills caches and pools.
    settled = np.array(soak.memory[len(soak.memory) // 4 :])
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0])
    name = f"soak of {minutes:g} min"
    lost = f"{name}, {len(soak.back_s)} kills: accepted requests lost"
    n = len(load.seconds)
    return [
        barred(lost, load.n_lost, "requests", "0", load.n_lost == 0, n),
        plain(f"{name}: told to come again (429)", load.statuses[429], "requests", n),
        plain(f"{name}: p99", load.percentile_ms(99), "ms", n),
        plain(f"{name}: longest time until ready after a kill", max(soak.back_s), "s", len(soak.back_s)),
        plain(f"{name}: memory of what was not killed", float(settled[:, 1].mean()), "MiB", len(settled)),
        plain(f"{name}: slope of that memory", slope, "MiB/min after the first quarter", len(settled)),
    ]


def say(line: str) -> None:
    """How far it is."""
    print(line, file=sys.stderr, flush=True)


def measured(folder: Path, seconds: float, soak_minutes: float, repetitions: int, **soak: float) -> list[Result]:
    """All rows. seconds: of each load. soak: see `soak_rows`."""
    run, wordy = make_run(folder), write_wordy(folder / "words")
    rows = latents_rows(wordy, repetitions)
    tree = tree_of(run, wordy)
    local = local_service(tree)
    with serving(folder, tree) as served:
        batched = {kind: loads_over_http(served.url, kind, CLIENTS, seconds) for kind in ANSWERS}
        for kind, loads in batched.items():
            rows += throughput_rows(loads, kind)
            rows += overhead_rows(served.url, local, kind, 2 * seconds)
        rows += first_token_rows(served.url, repetitions)
        capacity = max(load.per_second for load in batched[ANSWERS[1]].values())
        rows += overload_rows(served.url, capacity, seconds)
        rows += soak_rows(served, soak_minutes, **soak)
    with serving(folder, tree_of(run, wordy, engine={"rows": 1}, batch_requests=1)) as served:
        for kind in ANSWERS:
            alone = loads_over_http(served.url, kind, (BATCHING_CLIENTS,), seconds)
            rows.append(batching_row(kind, batched[kind][BATCHING_CLIENTS], alone[BATCHING_CLIENTS]))
    return rows


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="Of each load.")
    parser.add_argument("--soak-minutes", type=float, default=10.0)
    parser.add_argument("--repetitions", type=int, default=40, help="Of what is timed request by request.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        record(measured(Path(name), options.seconds, options.soak_minutes, options.repetitions))


if __name__ == "__main__":
    main()
