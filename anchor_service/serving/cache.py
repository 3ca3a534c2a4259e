"""Values by key, the least recently used dropped beyond a size; each is made once, however many ask at a time."""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(slots=True)
class CacheCounters:
    """misses: how often a value was made. hits: how often one was there, or in the making."""

    hits: int = 0
    misses: int = 0
    dropped: int = 0


class Cache(Generic[Value]):
    """For one event loop. size: bytes of a value. limit: bytes in all; 0 keeps nothing."""

    def __init__(self, limit: int, size: Callable[[Value], int]):
        self.counters = CacheCounters()
        self.n_bytes = 0
        self._limit = limit
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._making: dict[str, asyncio.Task[Value]] = {}

    async def get(self, key: str, make: Callable[[], Awaitable[Value]]) -> tuple[Value, bool]:
        """The value, and whether it was there or in the making. A failure is not kept; whoever waited gets it."""
        if key in self._values:
            self._values.move_to_end(key)
            self.counters.hits += 1
            return self._values[key], True
        is_new = key not in self._making
        if is_new:
            # In a context of its own: the first who asks may be cancelled, the others still wait.
            self._making[key] = asyncio.create_task(self._made(key, make), context=contextvars.Context())
        self.counters.misses += is_new
        self.counters.hits += not is_new
        return await asyncio.shield(self._making[key]), not is_new

    async def _made(self, key: str, make: Callable[[], Awaitable[Value]]) -> Value:
        try:
            value = await make()
        finally:
            del self._making[key]
        self._values[key] = value
        self.n_bytes += self._size(value)
        while self.n_bytes > self._limit:
            _, dropped = self._values.popitem(last=False)
            self.n_bytes -= self._size(dropped)
            self.counters.dropped += 1
        return value
