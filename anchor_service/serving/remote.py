"""Images by URL: HTTPS alone, from listed hosts, at public addresses, bounded in bytes and time, never redirected."""

from __future__ import annotations

import ipaddress
import socket
import ssl

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from anchor_service.serving.errors import ServiceError
from shared.serve_config import LimitsConfig

_TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "64:ff9b::/96")))
"""6to4 and NAT64: IPv6 addresses that stand for IPv4 ones, perhaps private ones."""
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "visual-latents"}


class RemoteImages:
    """Fetches what `limits.image_hosts` lets it. tls: trusted certificates; None: those of the system."""

    def __init__(self, limits: LimitsConfig, tls: ssl.SSLContext | None = None):
        self._limits = limits
        self._tls = tls or ssl.create_default_context()

    async def fetch(self, url: str) -> bytes:
        """The bytes that lie there, whatever they are. Raises ServiceError 422."""
        place = self._checked(url)
        # What is connected to is what the resolver checked: no name is resolved twice.
        connector = aiohttp.TCPConnector(resolver=_PublicResolver(), ssl=self._tls, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._limits.body_timeout_s)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, headers=_HEADERS, auto_decompress=False, trust_env=False
                ) as session,
                session.get(place, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise _refused(f"its host answered {response.status}, expected 200; redirects are not followed")
                return await self._body(response)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # Nothing of the error: it would tell which addresses answer.
            raise _refused("it could not be fetched") from error

    def _checked(self, url: str) -> URL:
        hosts = self._limits.image_hosts
        if not hosts:
            raise _refused("remote images are not fetched; send a data URL")
        try:
            place = URL(url)
            host, port = place.raw_host, place.port
        except ValueError as error:
            raise _refused("its URL is not valid") from error
        if place.scheme != "https" or place.raw_user is not None or place.raw_password is not None:
            raise _refused("only https URLs without a user are fetched")
        # The client connects to a literal address without asking the resolver, which is what keeps it public.
        if host is None or _is_address(host):
            raise _refused("hosts are named, not given by address")
        if not {host if port == 443 else None, f"{host}:{port}"} & set(hosts):
            raise _refused("images of its host are not fetched; see limits.image_hosts")
        return place

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._limits.body_bytes
        parts: list[bytes] = []
        n_bytes = 0
        async for part in response.content.iter_any():
            parts.append(part)
            n_bytes += len(part)
            if n_bytes > limit:
                raise _refused(f"it has more than {limit} bytes, which is the limit")
        return b"".join(parts)


def is_public(address: str) -> bool:
    """Whether an IP address is one that the whole internet shares: not loopback, private, link-local, reserved."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if any(ip in tunnel for tunnel in _TUNNELS):
            return False
    return ip.is_global and not ip.is_multicast


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _PublicResolver(AbstractResolver):
    """The system's resolver; a name with an address that is not public has none."""

    def __init__(self) -> None:
        self._system = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        if not all(is_public(one["host"]) for one in found):
            raise OSError(f"{host} has an address that is not public")
        return found

    async def close(self) -> None:
        await self._system.close()


def _refused(reason: str) -> ServiceError:
    return ServiceError(422, "remote_image", f"an image's URL: {reason}")
