"""The HTTP API over a `Service`, as an ASGI app. No Ray here."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from safetensors.numpy import save
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from anchor_service.serving.access import Access
from anchor_service.serving.chat import chat_completion, chat_stream
from anchor_service.serving.errors import ServiceError, error_body
from anchor_service.serving.gate import Gate
from anchor_service.serving.page import load_page
from anchor_service.serving.schema import ChatRequest, ErrorResponse, LatentsRequest, ScoreRequest, described
from anchor_service.serving.service import JOINT, Service

MOST_LISTED = 16_384
"""Numbers that `format: list` gives at most."""
_BINARY = "application/octet-stream"
_STATUSES = (400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 504)


def make_api(service: Service) -> ASGIApp:
    """The API behind its gate."""
    registry = CollectorRegistry()
    app = FastAPI(
        title="Visual-Latents",
        summary="Images and questions in; answers, scores and latents out.",
        responses={status: {"model": ErrorResponse} for status in _STATUSES},
        dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key, where the service has any."))],
    )
    _add_error_handlers(app)
    _add_models(app, service)
    _add_state(app, service, registry)
    _add_page(app)
    return Gate(app, Access(service.config.access), service.config.limits, registry)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", tags=["answers"])
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a question about images, as OpenAI's chat completions do. `visual_latents` is this service's own.

        One user message. With `stream` the answer comes as server-sent events. `joint` answers with all anchors.
        """
        answering = await service.prepare(body)
        if not body.stream:
            return JSONResponse(await chat_completion(service, answering))
        # The first token is awaited here, so that an error until then still has a status of its own.
        events = service.answer(answering, replayable=False)
        first = await anext(events)
        stream = chat_stream(service, answering, first, events, request.state.request_id)
        return StreamingResponse(_closing(stream, events), media_type="text/event-stream")

    @app.post("/v1/latents", tags=["latents"], responses={200: {"content": {_BINARY: {}}}})
    async def latents(body: LatentsRequest, accept: Annotated[str, Header()] = "") -> Response:
        """Latents of images. With `Accept: application/octet-stream` as a safetensors file with one tensor, `latents`
        (images, K, width); else as JSON, each with dtype, shape and base64, or as nested lists.
        """
        n_numbers = len(body.images) * service.shape[0] * service.shape[1]
        if body.format == "list" and n_numbers > MOST_LISTED:
            raise ServiceError(
                422, "too_many", f"{n_numbers} numbers as lists, more than {MOST_LISTED}; use format base64"
            )
        found = await service.latents_of_urls(body.images)
        if _BINARY in accept:
            return Response(save({"latents": np.stack([one for one, _ in found])}), media_type=_BINARY)
        return JSONResponse(
            {
                "latents": [one.tolist() if body.format == "list" else _encoded(one) for one, _ in found],
                "cached": [cached for _, cached in found],
            }
        )

    @app.post("/v1/score", tags=["latents"])
    async def score(body: ScoreRequest) -> dict[str, Any]:
        """How probable anchors find answers: log p of each token, the end of turn last, and their sum."""
        entries = await service.score(body.entries, body.anchors)
        return {"entries": [{"questions": [{"anchors": question} for question in entry]} for entry in entries]}

    @app.get("/v1/models", tags=["answers"])
    async def models() -> dict[str, Any]:
        """Anchors, and `joint`: all of them together."""
        facts = {"latents": service.shape[0], "width": service.shape[1], "joint_groups": service.joint.groups}
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "visual-latents"}
            | ({"visual_latents": facts} if name == JOINT else {})
            for name in service.models
        ]
        return {"object": "list", "data": data}


def _add_state(app: FastAPI, service: Service, registry: CollectorRegistry) -> None:
    cache = {
        name: Gauge(f"visual_latents_cache_{name}", f"Latents cache: {name}.", registry=registry)
        for name in ("hits", "misses", "dropped", "bytes")
    }
    part = Gauge("visual_latents_replica", "A counter of one replica.", ["deployment", "counter"], registry=registry)

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """Whether the front answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["state"])
    async def readyz() -> Response:
        """Whether generator and anchors answer, too: 200 or 503."""
        parts = await service.is_ready()
        return JSONResponse({"ready": all(parts.values()), "parts": parts}, 200 if all(parts.values()) else 503)

    @app.get("/metrics", tags=["state"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text: requests, latencies, cache, and what one replica of each deployment has computed."""
        counters = service.latents_cache.counters
        cache["hits"].set(counters.hits)
        cache["misses"].set(counters.misses)
        cache["dropped"].set(counters.dropped)
        cache["bytes"].set(service.latents_cache.n_bytes)
        for name, state in (await service.states()).items():
            for counter, value in state.items():
                part.labels(name, counter).set(value)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    served = load_page()

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(served.html, headers={"Content-Security-Policy": served.policy})


def _add_error_handlers(app: FastAPI) -> None:
    def answer(request: Request, status: int, code: str, message: str, headers: Any = None) -> JSONResponse:
        return JSONResponse(error_body(status, code, message, request.state.request_id), status, headers)

    @app.exception_handler(ServiceError)
    async def of_service(request: Request, error: ServiceError) -> JSONResponse:
        return answer(request, error.status, error.code, error.message, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, 422, "invalid_request", described(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, error.status_code, "http_error", str(error.detail), error.headers)


async def _closing(stream: AsyncIterator[str], events: Any) -> AsyncIterator[str]:
    """The stream; when the client has gone, what it comes from is closed at once, which cancels the job."""
    try:
        async for part in stream:
            yield part
    finally:
        await events.aclose()


def _encoded(latents_KD: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(latents_KD.astype("<f4").tobytes()).decode()
    return {"dtype": "float32", "shape": list(latents_KD.shape), "data": data}
