"""Images by URL: what is fetched from a real HTTPS server, and what never is."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anchor_service.serving import remote
from anchor_service.serving.errors import ServiceError
from anchor_service.serving.remote import RemoteImages, is_public
from shared.serve_config import LimitsConfig
from tests.serving import EXAMPLE

LIMIT = 10_000
LIMIT_S = 1.0
NAME = "localhost"


class Images(BaseHTTPRequestHandler):
    """A host of images, not all of them good."""

    asked: list[str] = []  # noqa: RUF012 - shared by all requests on purpose

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/image.png")
        self.end_headers()
        if self.path == "/slow":
            time.sleep(2 * LIMIT_S)
        if status == 200:
            self.wfile.write(EXAMPLE if self.path == "/image.png" else b"x" * (LIMIT + 1))

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def write_certificate(file: Path) -> None:
    """For NAME, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now.replace(year=now.year + 1)
    )
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    write_certificate(file)
    return file


@pytest.fixture(scope="module")
def port(certificate: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def images(port: int, certificate: Path) -> RemoteImages:
    Images.asked.clear()
    limits = LimitsConfig(body_bytes=LIMIT, body_timeout_s=LIMIT_S, image_hosts=(f"{NAME}:{port}",))
    return RemoteImages(limits, ssl.create_default_context(cafile=str(certificate)))


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing that stands between a test and its server."""
    monkeypatch.setattr(remote, "is_public", lambda address: True)


def refusal(images: RemoteImages, url: str) -> str:
    with pytest.raises(ServiceError) as raised:
        asyncio.run(images.fetch(url))
    assert (raised.value.status, raised.value.code) == (422, "remote_image")
    return raised.value.message


@pytest.mark.usefixtures("loopback_is_public")
def test_an_image_of_a_listed_host_is_fetched(images: RemoteImages, port: int) -> None:
    assert asyncio.run(images.fetch(f"https://{NAME}:{port}/image.png")) == EXAMPLE


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize(
    ("path", "words"),
    [("/moved", "answered 302"), ("/gone", "answered 404"), ("/large", f"more than {LIMIT} bytes"), ("/slow", "could")],
)
def test_what_a_listed_host_must_not_send(images: RemoteImages, port: int, path: str, words: str) -> None:
    started = time.monotonic()
    assert words in refusal(images, f"https://{NAME}:{port}{path}")
    assert Images.asked == [path], "no redirect was followed"
    assert time.monotonic() - started < 1.9 * LIMIT_S


@pytest.mark.usefixtures("loopback_is_public")
def test_a_certificate_that_nobody_trusts(port: int) -> None:
    limits = LimitsConfig(image_hosts=(f"{NAME}:{port}",))
    assert "could not be fetched" in refusal(RemoteImages(limits), f"https://{NAME}:{port}/image.png")


def test_a_listed_name_at_a_private_address_is_never_connected_to(images: RemoteImages, port: int) -> None:
    message = refusal(images, f"https://{NAME}:{port}/image.png")
    assert message.endswith("it could not be fetched"), "and nothing tells why"
    assert Images.asked == []


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:{port}/image.png",
        "https://localhost/image.png",
        "https://elsewhere.test:{port}/image.png",
        "https://localhost:{port}@elsewhere.test/image.png",
        "https://user@localhost:{port}/image.png",
        "http://localhost:{port}/image.png",
        "https://localhost.:{port}/image.png",
        "https://[::1]:{port}/image.png",
        "https://2130706433:{port}/image.png",
        "https://:{port}/image.png",
        "https://localhost:99999999/image.png",
        "https://[",
    ],
)
def test_other_places_are_not_asked(images: RemoteImages, port: int, url: str) -> None:
    refusal(images, url.format(port=port))
    assert Images.asked == []


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "93.184.216.34"])
def test_a_listed_address_is_not_asked_either(port: int, host: str) -> None:
    limits = LimitsConfig(image_hosts=(f"{host.strip('[]')}:{port}", f"{host}:{port}"))
    assert "not given by address" in refusal(RemoteImages(limits), f"https://{host}:{port}/image.png")
    assert Images.asked == []


def test_nothing_is_fetched_unless_hosts_are_listed(port: int) -> None:
    assert "send a data URL" in refusal(RemoteImages(LimitsConfig()), f"https://{NAME}:{port}/image.png")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_every_address_of_a_name_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolved(*_: Any) -> list[dict[str, Any]]:
        return [{"host": "93.184.216.34"}, {"host": "10.0.0.1"}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolved)

    async def resolve() -> None:
        await remote._PublicResolver().resolve("images.test", 443)

    with pytest.raises(OSError, match="not public"):
        asyncio.run(resolve())
