"""What every request passes before the API: key, rate, room, a bounded body in time, a deadline; and its log line."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anchor_service.serving.access import Access
from anchor_service.serving.errors import ServiceError, error_body, too_busy
from shared.serve_config import LimitsConfig

log = logging.getLogger("visual_latents.serving")
REQUEST_ID = "x-request-id"
OPEN_PATHS = ("/", "/healthz", "/readyz")
"""Answered without a key, and however many requests are at work."""


def log_to_stdout() -> None:
    """One JSON object per line."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class Gate:
    """ASGI middleware around the API. One per front replica."""

    def __init__(self, app: ASGIApp, access: Access, limits: LimitsConfig, registry: CollectorRegistry):
        self._app = app
        self._access = access
        self._limits = limits
        self._n_at_work = 0
        self._requests = Counter(
            "visual_latents_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram("visual_latents_request_seconds", "Until the last byte.", ["path"], registry=registry)
        at_work = Gauge("visual_latents_requests_at_work", "At work or waiting.", registry=registry)
        at_work.set_function(lambda: self._n_at_work)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Passage(scope, send).run(self, receive)

    async def admit(self, passage: _Passage, receive: Receive) -> None:
        """The request's way in. Raises ServiceError."""
        scope = passage.scope
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, passage.send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        passage.caller = self._access.check(headers.get("authorization"), (scope.get("client") or (None,))[0])
        if self._n_at_work >= self._limits.requests:
            raise too_busy(f"{self._limits.requests} requests are at work or waiting, which is the limit; try again")
        self._n_at_work += 1
        try:
            body = await self._body(headers, receive)
            async with asyncio.timeout(self._limits.request_timeout_s):
                await self._app(scope, _replayed(body, receive), passage.send)
        except TimeoutError as error:
            limit = self._limits.request_timeout_s
            raise ServiceError(504, "timeout", f"not done within {limit:g} s, which is the limit") from error
        finally:
            self._n_at_work -= 1

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit, limit_s = self._limits.body_bytes, self._limits.body_timeout_s
        too_large = ServiceError(413, "body_too_large", f"the body has more than {limit} bytes, which is the limit")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    n_bytes += len(parts[-1])
                    if n_bytes > limit:
                        raise too_large
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ServiceError(
                408, "body_too_slow", f"the body did not arrive within {limit_s:g} s, which is the limit"
            ) from error

    def record(self, passage: _Passage, seconds: float) -> None:
        """Metrics and log line of a request that is over."""
        # Paths of the API alone: what clients make up must not become labels.
        route = passage.scope.get("route")
        path = getattr(route, "path", None) or "other"
        self._requests.labels(path, str(passage.status)).inc()
        self._seconds.labels(path).observe(seconds)
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": passage.request_id,
            "method": passage.scope["method"],
            "path": path,
            "status": passage.status,
            "seconds": round(seconds, 4),
            "caller": passage.caller,
        }
        if passage.failure is not None:
            line["failure"] = passage.failure
        log.info(json.dumps(line))


class _Passage:
    """One request on its way."""

    def __init__(self, scope: Scope, send: Send):
        self.scope = scope
        # Ray Serve gives every request an id, which its answer carries.
        given = Headers(scope=scope).get(REQUEST_ID, "")
        self._is_given = re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) is not None
        self.request_id = given if self._is_given else uuid.uuid4().hex
        self.status = 499
        """Until an answer has begun: the client has gone."""
        self.caller: str | None = None
        self.failure: str | None = None
        self._send = send
        self._has_begun = False
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            self.status = message["status"]
            if not self._is_given:
                header = (REQUEST_ID.encode(), self.request_id.encode())
                message["headers"] = [*message.get("headers", []), header]
        await self._send(message)

    async def run(self, gate: Gate, receive: Receive) -> None:
        started = time.perf_counter()
        try:
            await gate.admit(self, receive)
        except ServiceError as error:
            await self._refuse(error, receive)
        except Exception as error:  # noqa: BLE001 - a client must never see one
            self.failure = f"{type(error).__name__}: {error}"[:500]
            await self._refuse(ServiceError(500, "internal_error", "something went wrong here"), receive)
        finally:
            gate.record(self, time.perf_counter() - started)

    async def _refuse(self, error: ServiceError, receive: Receive) -> None:
        if self._has_begun:  # too late for a status; the stream ends without its last mark
            self.failure = self.failure or error.code
            return
        body = error_body(error.status, error.code, error.message, self.request_id)
        headers = {**error.headers, "Connection": "close"} if error.status in (408, 413) else error.headers
        await JSONResponse(body, error.status, headers)(self.scope, receive, self.send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then whatever comes: a disconnect."""
    is_read = False

    async def next_message() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
