"""Errors as clients see them: status, type, code, one sentence; never a path, a stack trace or what they sent."""

from __future__ import annotations

from typing import Any


class ServiceError(Exception):
    """Answered with `status` and `{"error": {...}}`. headers: further ones, such as Retry-After."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(status, code, message, headers)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, code: str, message: str, request_id: str) -> dict[str, Any]:
    """The JSON of an error. Characters that no encoding has are written out."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    plain = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": plain, "type": kind, "code": code, "request_id": request_id}}


def too_busy(what: str, retry_after_s: int = 1) -> ServiceError:
    """429 with Retry-After."""
    return ServiceError(429, "too_many_requests", what, {"Retry-After": str(retry_after_s)})
