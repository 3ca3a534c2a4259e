"""The service on this machine: a local Ray, Serve, the application, until it is interrupted."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
from collections.abc import Iterator
from threading import Event

from ray import serve
from ray.serve.schema import LoggingConfig
from rich.console import Console

from anchor_service.cluster import ray_cluster
from anchor_service.serving.app import build
from shared.errors import ConfigError
from shared.serve_config import ServeConfig, ServeFile

NAME = "visual-latents"
_SYSTEM_CPUS = 1.0
"""What Serve's controller and proxy may take, and room for a replica that is replaced."""


def serve_here(file: ServeFile, console: Console) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError before anything is started."""
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with console.status("starting the service"), contextlib.ExitStack() as stack:
        url = stack.enter_context(running(file))
        stack = stack.pop_all()
    with stack:
        console.print(f"ready: {url} (the API is described at {url}/docs); Ctrl-C ends it")
        stop.wait()
        console.print("stopping")


@contextlib.contextmanager
def running(file: ServeFile) -> Iterator[str]:
    """The service for as long as the context lasts; its URL. Ends the Ray that it started."""
    check_host(file)
    application = build(file.config.model_dump(mode="json"))
    with ray_cluster(_cpus(file.config) + _SYSTEM_CPUS):
        serve.start(
            http_options={
                "host": file.host,
                "port": file.port,
                # The front answers in time by itself; this ends what it could not.
                "request_timeout_s": 2 * file.config.limits.request_timeout_s,
            },
            logging_config=LoggingConfig(enable_access_log=False),
        )
        try:
            serve.run(application, name=NAME, route_prefix="/")
            yield f"http://{file.host}:{file.port}"
        finally:
            serve.shutdown()


def check_host(file: ServeFile) -> None:
    """Raises ConfigError if others could reach a service without keys."""
    access = file.config.access
    if access.keys_sha256 or access.keys_variable:
        return
    try:
        is_loopback = file.host == "localhost" or ipaddress.ip_address(file.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            f"http_options.host: {file.host} without API keys; set access.keys_sha256 or access.keys_variable, or "
            "host: 127.0.0.1"
        )


def _cpus(config: ServeConfig) -> float:
    return sum(part.cpus * part.max_replicas for part in (config.generator, config.front, *config.anchors))
