"""Events of an answer as OpenAI's chat completions, whole or as server-sent events."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from anchor_service.serving.engine import EndEvent, Event, TokenEvent
from anchor_service.serving.errors import ServiceError, error_body
from anchor_service.serving.service import Answering, Service

log = logging.getLogger("visual_latents.serving")


@dataclass(slots=True)
class _Choice:
    """One answer as it grows."""

    text: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    end: EndEvent | None = None


async def chat_completion(service: Service, answering: Answering) -> dict[str, Any]:
    """The whole response. Whatever a replica had written when it died is written again."""
    choices = _choices(answering)
    with_logprobs = answering.request.logprobs
    async for events in service.answer(answering, replayable=True):
        for event in events:
            _take(choices, event, with_logprobs)
    body = _head(answering, "chat.completion")
    body["choices"] = [
        {
            "index": i,
            "message": {"role": "assistant", "content": choice.text},
            "finish_reason": choice.end.reason if choice.end else None,
            "logprobs": {"content": choice.tokens} if with_logprobs and choice.tokens else None,
        }
        for i, choice in enumerate(choices)
    ]
    body["usage"] = _usage(choices)
    if answering.request.visual_latents.evidence:
        body["visual_latents"] = await service.evidence(answering, choices[0].text)
    return body


async def chat_stream(
    service: Service, answering: Answering, first: Sequence[Event], rest: AsyncIterator[list[Event]], request_id: str
) -> AsyncIterator[str]:
    """Server-sent events, from the first events on. An error ends them with an event of its own, without [DONE]."""
    choices = _choices(answering)
    head = _head(answering, "chat.completion.chunk")
    try:
        for i in range(len(choices)):
            yield _sse({**head, "choices": [_chunk_choice(i, {"role": "assistant", "content": ""})]})
        for event in first:
            yield _sse({**head, "choices": [_chunk_of(answering, choices, event)]})
        async for events in rest:
            for event in events:
                yield _sse({**head, "choices": [_chunk_of(answering, choices, event)]})
        options, request = answering.request.stream_options, answering.request
        tail: dict[str, Any] = {}
        if options is not None and options.include_usage:
            tail["usage"] = _usage(choices)
        if request.visual_latents.evidence:
            tail["visual_latents"] = await service.evidence(answering, choices[0].text)
        if tail:
            yield _sse({**head, "choices": [], **tail})
        yield "data: [DONE]\n\n"
    except ServiceError as error:
        yield _sse(error_body(error.status, error.code, error.message, request_id))
    except Exception as error:  # noqa: BLE001 - a client must never see one
        log.info(json.dumps({"request_id": request_id, "failure": f"{type(error).__name__}: {error}"[:500]}))
        yield _sse(error_body(500, "internal_error", "something went wrong here", request_id))


def _choices(answering: Answering) -> list[_Choice]:
    return [_Choice() for _ in range(answering.request.n)]


def _head(answering: Answering, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": answering.request.model,
    }


def _take(choices: Sequence[_Choice], event: Event, with_logprobs: bool) -> dict[str, Any] | None:
    """Add an event to its answer; the token's log-probabilities, if it is one and they are asked for."""
    choice = choices[event.sample]
    choice.text += event.text
    if isinstance(event, EndEvent):
        choice.end = event
    if isinstance(event, EndEvent) or not with_logprobs:
        return None
    choice.tokens.append(_logprobs(event))
    return choice.tokens[-1]


def _logprobs(event: TokenEvent) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        # OpenAI's floor for what is as good as impossible; JSON has no infinity.
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}

    return {**one(event.token, event.logprob), "top_logprobs": [one(*top) for top in event.top]}


def _chunk_of(answering: Answering, choices: Sequence[_Choice], event: Event) -> dict[str, Any]:
    token = _take(choices, event, answering.request.logprobs)
    reason = event.reason if isinstance(event, EndEvent) else None
    logprobs = {"content": [token]} if token is not None else None
    return _chunk_choice(event.sample, {"content": event.text} if event.text else {}, reason, logprobs)


def _chunk_choice(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}


def _usage(choices: Sequence[_Choice]) -> dict[str, int]:
    ends = [choice.end for choice in choices if choice.end is not None]
    prompt, completion = ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
