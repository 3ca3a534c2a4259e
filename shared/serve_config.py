"""The config of the service: which run is served, by which anchors, within which bounds. Free of torch and Ray.

In a file of `deploy/serve/` it stands as `applications[0].args`, so `serve deploy` and `python -m anchor_service serve`
read the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from shared.config import Dtype, Section, parse_section
from shared.errors import ConfigError


class ReplicasConfig(Section):
    """How many processes of a deployment there are, and what each takes."""

    min_replicas: int = Field(1, ge=1, le=256)
    max_replicas: int = Field(1, ge=1, le=256, description="Above min_replicas, Ray Serve scales with the load.")
    cpus: float = Field(0.5, ge=0, description="CPUs of each replica, for placement.")
    gpus: float = Field(0.0, ge=0, description="GPUs of each replica; 0 runs on the CPU.")

    @model_validator(mode="after")
    def _in_order(self) -> ReplicasConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is below min_replicas: {self.min_replicas}; raise max_replicas"
            )
        return self


class VllmConfig(Section):
    """vLLM writes an anchor's answers. Scores and joint answers stay with its own model, which is loaded, too."""

    exported: Path = Field(description="The anchor's language model: python -m anchor_service export.")
    python: str = Field(description="Interpreter of vLLM's environment, which holds this project too.")
    memory_share: float = Field(0.5, gt=0, le=1, description="Of the GPU, for vLLM's weights, keys and values.")


class ServedAnchorConfig(ReplicasConfig):
    """One frozen reader that answers. Its width must be the generator's."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Model name in the API.")
    model: str = Field(description="Hugging Face folder or hub name.")
    dtype: Dtype = "float32"
    vllm: VllmConfig | None = Field(None, description="Needs `pool.latent_positions: text` in the run.")

    @model_validator(mode="after")
    def _not_joint(self) -> ServedAnchorConfig:
        if self.name == "joint":
            raise ValueError("name: joint is the name of all anchors together; choose another")
        return self


class EngineConfig(Section):
    """Continuous decoding of one anchor."""

    rows: int = Field(32, ge=1, le=1024, description="Answers written at the same time; 1 switches batching off.")
    continuations: int = Field(64, ge=1, le=4096, description="Answers of joint decoding whose keys and values stay.")


class LimitsConfig(Section):
    """Bounds of a request. Each is answered with a 4xx that states it."""

    body_bytes: int = Field(8 * 2**20, ge=1024, le=2**30)
    image_pixels: int = Field(20_000_000, ge=1, le=100_000_000, description="Of each image.")
    images: int = Field(4, ge=1, le=64, description="Images that a question may be about.")
    batch: int = Field(16, ge=1, le=1024, description="Entries of a batched request, and questions of an entry.")
    question_characters: int = Field(2000, ge=1, le=100_000, description="Of a question, and of an answer to score.")
    max_tokens: int = Field(256, ge=1, le=8192, description="Of one answer.")
    n: int = Field(8, ge=1, le=128, description="Answers to one question.")
    latent_norm: float = Field(1000.0, gt=0, allow_inf_nan=False, description="Length of a latent from outside.")
    requests: int = Field(64, ge=1, le=10_000, description="At work or waiting at one time; more get 429.")
    request_timeout_s: float = Field(60.0, gt=0, le=3600)
    body_timeout_s: float = Field(10.0, gt=0, le=600, description="For a request's body, or a remote image, to arrive.")
    image_hosts: tuple[str, ...] = Field(
        (),
        description="Hosts, as NAME or NAME:PORT, whose https images are fetched, from public addresses; none: no URL.",
    )


class AccessConfig(Section):
    """Who may ask. Without any key the service answers loopback addresses alone."""

    keys_sha256: tuple[str, ...] = Field((), description="SHA-256 of each API key, in hexadecimal.")
    keys_variable: str | None = Field(None, description="Environment variable with keys, separated by commas.")
    requests_per_minute: int = Field(600, ge=1, description="Of each key, at each replica of the front.")

    @model_validator(mode="after")
    def _are_digests(self) -> AccessConfig:
        for digest in self.keys_sha256:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError("keys_sha256: an entry is no SHA-256; take `printf %s KEY | sha256sum`")
        return self


class JointConfig(Section):
    """How anchors answer together."""

    weights: dict[str, float] = Field({}, description="By anchor; 1 for those it does not name.")
    mean: Literal["arithmetic", "geometric"] = Field("arithmetic", description="Of next-token distributions.")

    @model_validator(mode="after")
    def _positive(self) -> JointConfig:
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights.{name}: {weight} must be above 0 and finite")
        return self


class ServeConfig(Section):
    """Everything that the service needs."""

    run: Path = Field(description="Run folder whose best checkpoint writes the latents.")
    anchors: tuple[ServedAnchorConfig, ...] = Field(min_length=1)
    generator: ReplicasConfig = ReplicasConfig()
    front: ReplicasConfig = ReplicasConfig(cpus=0.1)
    engine: EngineConfig = EngineConfig()
    batch_requests: int = Field(
        16,
        ge=1,
        le=256,
        description="Requests in one pass of the generator, or of a scoring anchor; 1: no batching.",
    )
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    joint: JointConfig = JointConfig()
    cache_bytes: int = Field(64 * 2**20, ge=0, description="Latents kept at each replica of the front; 0: none.")

    @model_validator(mode="after")
    def _names_agree(self) -> ServeConfig:
        names = [anchor.name for anchor in self.anchors]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"anchors: two are named {name}; rename one")
        for name in self.joint.weights:
            if name not in names:
                raise ValueError(f"joint.weights: no anchor {name!r}; there are {', '.join(names)}")
        return self


class ServeFile(Section):
    """What `python -m anchor_service serve` takes from a file of Ray Serve."""

    config: ServeConfig
    host: str
    port: int = Field(ge=0, le=65535)


def load_serve_file(path: Path) -> ServeFile:
    """Read a Serve file with one application of this project. Raises ConfigError naming field, value and fix."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; the shipped ones lie in deploy/serve") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    applications: Any = tree.get("applications") if isinstance(tree, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: applications: one application is expected; see deploy/serve/toy.yaml")
    http = tree.get("http_options") or {}
    config = parse_section(ServeConfig, applications[0].get("args") or {}, f"{path}: applications.0.args")
    place = {"host": http.get("host", "127.0.0.1"), "port": http.get("port", 8000)}
    return parse_section(ServeFile, {"config": config, **place}, f"{path}: http_options")
