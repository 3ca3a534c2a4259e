"""How asynchronous requests meet models that belong to one thread."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from anchor_service.serving.engine import EndEvent, Engine, Event, Job

Item = TypeVar("Item")
Result = TypeVar("Result")
Sink = Callable[[list[Event] | BaseException], None]


async def gathered(*calls: Awaitable[Result]) -> list[Result]:
    """The results of calls that run at the same time; if one fails, the others are cancelled and it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(call)) for call in calls]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return [task.result() for task in tasks]


async def _awaited(call: Awaitable[Result]) -> Result:
    return await call


class Batcher(Generic[Item, Result]):
    """Packs calls that wait at the same time: while one batch runs the next one gathers, so nobody waits for nothing.

    run: from items to one result or exception each; one batch at a time.
    """

    def __init__(self, run: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]], size: int):
        self._run = run
        self._size = size
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The result of one item; raises what became of it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            # Without the caller's context: the batch is not the caller's alone, and must not be cancelled with it.
            self._task = asyncio.create_task(self._work(), context=contextvars.Context())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            batch = [(item, future) for item, future in batch if not future.cancelled()]
            if not batch:
                continue
            results: Sequence[Result | Exception]
            try:
                results = await self._run([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - every caller is told
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)


class EngineThread:
    """A thread that owns an engine, and everything else that uses its model.

    It takes a step whenever there is work, and does what was sent to it between two steps.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sinks: dict[int, Sink] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, sink: Sink) -> Callable[[], None]:
        """Have a job decoded; the sink is called in the thread. Returns what cancels it."""
        numbers: list[int] = []

        def add() -> None:
            numbers.append(self.engine.add(job))
            self._sinks[numbers[0]] = sink

        def cancel() -> None:
            if self._sinks.pop(numbers[0], None) is not None:
                self.engine.cancel(numbers[0])

        self._commands.put(add)
        return lambda: self._commands.put(cancel)

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function, called in the thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Result | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def command() -> None:
            if future.cancelled():
                return
            try:
                outcome: tuple[Any, Exception | None] = (function(), None)
            except Exception as error:  # noqa: BLE001 - the caller is told
                outcome = (None, error)
            loop.call_soon_threadsafe(settle, *outcome)

        self._commands.put(command)
        return await future

    def close(self) -> None:
        """End the thread after what was sent to it."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while self.engine.is_idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
            self._step()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # noqa: BLE001 - out of memory, say: those at work are told, others go on
            for job_id in self.engine.forget():
                self._sinks.pop(job_id)(error)
            return
        by_job: dict[int, list[Event]] = {}
        for job_id, event in events:
            by_job.setdefault(job_id, []).append(event)
        for job_id, new in by_job.items():
            self._sinks[job_id](new)
        for job_id in by_job:
            self._close_if_ended(job_id, by_job[job_id])

    def _close_if_ended(self, job_id: int, events: Sequence[Event]) -> None:
        if any(isinstance(event, EndEvent) for event in events) and not self.engine.has(job_id):
            del self._sinks[job_id]
