"""Clients of the service under load, in one event loop: a bounded number that ask again, or arrivals at a set rate."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

TIMEOUT_S = 120.0
Ask = Callable[[int], Awaitable[int]]
"""From the number of a request to the status of its answer; 0: the connection broke."""
BodyOf = Callable[[int], dict[str, Any]]
"""From the number of a request to what it asks."""


@dataclass
class Load:
    """What clients saw. seconds: of answers with status 200; refused_s: of all others."""

    duration_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return len(self.seconds) / self.duration_s

    @property
    def n_lost(self) -> int:
        """Requests that were neither answered nor told to come again."""
        return sum(n for status, n in self.statuses.items() if status not in (200, 429))

    def percentile_ms(self, percent: float) -> float:
        """Of answers."""
        return 1e3 * float(np.percentile(self.seconds, percent))

    async def add(self, ask: Ask, number: int) -> None:
        """Ask, and keep what came of it."""
        started = time.perf_counter()
        status = await ask(number)
        taken = time.perf_counter() - started
        self.statuses[status] += 1
        (self.seconds if status == 200 else self.refused_s).append(taken)


async def closed_loop(ask: Ask, n_clients: int, duration_s: float) -> Load:
    """Each client asks again as soon as it is answered."""
    load, numbers = Load(), itertools.count()
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - started < duration_s:
            await load.add(ask, next(numbers))

    await asyncio.gather(*(client() for _ in range(n_clients)))
    load.duration_s = time.perf_counter() - started
    return load


async def open_loop(ask: Ask, per_second: float, duration_s: float, most: int) -> tuple[Load, float]:
    """Requests arrive at a set rate, whatever becomes of those before them; `most` of them in all.

    Returns the load, and the arrivals per second that the clients managed.
    """
    load = Load()
    n = max(2, min(most, round(per_second * duration_s)))
    started = time.perf_counter()
    at_work = []
    for number in range(n):
        await asyncio.sleep(max(0.0, started + number / per_second - time.perf_counter()))
        at_work.append(asyncio.create_task(load.add(ask, number)))
    arrived_s = time.perf_counter() - started
    await asyncio.gather(*at_work)
    load.duration_s = time.perf_counter() - started
    return load, (n - 1) / arrived_s


@contextlib.asynccontextmanager
async def asking(url: str, body_of: BodyOf, n_bodies: int | None = None) -> AsyncIterator[Ask]:
    """Ask over kept-alive connections. n_bodies: so many in turn, made beforehand; None: one for each request."""

    def made(number: int) -> bytes:
        return json.dumps(body_of(number)).encode()

    ready = [made(number) for number in range(n_bodies or 0)]
    headers = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:

        async def ask(number: int) -> int:
            data = ready[number % len(ready)] if ready else made(number)
            try:
                async with session.post(f"{url}/v1/chat/completions", data=data) as response:
                    await response.read()
                    return response.status
            except (aiohttp.ClientError, TimeoutError):
                return 0

        yield ask


def http_load(url: str, body_of: BodyOf, n_bodies: int, n_clients: int, duration_s: float) -> Load:
    """A closed loop over HTTP."""

    async def go() -> Load:
        async with asking(url, body_of, n_bodies) as ask:
            return await closed_loop(ask, n_clients, duration_s)

    return asyncio.run(go())
