"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Callable

from anchor_service.serving.errors import ServiceError, too_busy
from shared.errors import ConfigError
from shared.serve_config import AccessConfig

OPEN = "loopback"
"""Stands for the key where none is configured."""


class Access:
    """Keys and their rates. One per front replica; rates are counted there."""

    def __init__(self, config: AccessConfig, clock: Callable[[], float] = time.monotonic):
        self._digests = [*config.keys_sha256, *map(_digest, _keys_of_environment(config.keys_variable))]
        self._per_minute = config.requests_per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def check(self, authorization: str | None, client: str | None) -> str:
        """The caller's name for logs: the beginning of its key's digest. Raises ServiceError 401, 403 or 429."""
        caller = self._caller(authorization, client)
        self._take_one(caller)
        return caller

    def _caller(self, authorization: str | None, client: str | None) -> str:
        if not self._digests:
            if client is None or not _is_loopback(client):
                raise ServiceError(
                    403, "no_keys", "no API key is configured, so only loopback is answered; set access.keys_sha256"
                )
            return OPEN
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        # Every digest is compared, in constant time: how long it takes tells nothing.
        known = sum(hmac.compare_digest(digest, one) for one in self._digests)
        if scheme.lower() != "bearer" or not known:
            raise ServiceError(
                401,
                "invalid_api_key",
                "send a valid key as `Authorization: Bearer KEY`",
                {"WWW-Authenticate": "Bearer"},
            )
        return digest[:8]

    def _take_one(self, caller: str) -> None:
        """A bucket that holds a minute's requests and fills steadily."""
        now = self._clock()
        left, then = self._buckets.get(caller, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - then) * self._per_minute / 60)
        if left < 1:
            self._buckets[caller] = (left, now)
            wait_s = int((1 - left) * 60 / self._per_minute) + 1
            raise too_busy(f"more than {self._per_minute} requests per minute with this key", wait_s)
        self._buckets[caller] = (left - 1, now)


def _keys_of_environment(variable: str | None) -> list[str]:
    if variable is None:
        return []
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(f"access.keys_variable: {variable} is not set or empty; set it to keys separated by commas")
    return keys


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _is_loopback(client: str) -> bool:
    try:
        return ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False
