"""Training methods, one file each. A method turns a batch into a loss; `METHODS` is the table."""

from __future__ import annotations

from shared.config import Config, parse_section
from shared.errors import ConfigError
from shared.vlm.generator import Generator
from trainer.methods.anchored import AnchoredMethod
from trainer.methods.base import Method
from trainer.methods.gap import GapMethod
from trainer.methods.livr import LatentsOnlyMethod, LivrMethod, LivrReader, MaskOnlyMethod, SftMethod

METHODS: dict[str, type[Method]] = {
    "anchored": AnchoredMethod,
    "livr": LivrMethod,
    "sft": SftMethod,
    "latents_only": LatentsOnlyMethod,
    "mask_only": MaskOnlyMethod,
    "gap": GapMethod,
}

_ASK_ANCHORS = ("reading", "causal")
"""Suites of methods that need no anchor, but have nothing to say without one."""


def with_checked_method(config: Config) -> Config:
    """The config with the method's options checked and complete. Raises ConfigError."""
    method = METHODS.get(config.method)
    if method is None:
        raise ConfigError(f"method: {config.method!r} is not known; use one of {', '.join(METHODS)}")
    if method.needs_anchors and not config.anchors:
        raise ConfigError(f"anchors: method {config.method} learns from anchors; add at least one")
    options = parse_section(method.Options, config.options, f"options of method {config.method}")
    return config.model_copy(update={"options": options.model_dump(mode="json")})


def chosen_suites(config: Config, asked: str | None) -> list[str]:
    """The suites of `evaluate`: the one asked for, all that the method has, or its first. Raises ConfigError.

    Without an anchor, those that ask anchors are no part of all.
    """
    suites = METHODS[with_checked_method(config).method].suites
    if asked == "all":
        return [suite for suite in suites if config.all_anchors or suite not in _ASK_ANCHORS]
    if asked is not None and asked not in suites:
        raise ConfigError(f"--suite {asked}: not for method {config.method}; use one of {', '.join(suites)}")
    if asked in _ASK_ANCHORS and not config.all_anchors:
        raise ConfigError(f"--suite {asked}: the run has no anchor; name one in anchors or evaluation.unseen")
    return [asked or suites[0]]


def self_reader(config: Config, generator: Generator) -> LivrReader:
    """What the generator of a run answers with by itself. Raises ConfigError for a method whose generator does not."""
    method = METHODS[config.method]
    if not issubclass(method, LivrMethod):
        raise ConfigError(f"suite usage: method {config.method} does not answer by itself; its suites are the others")
    return LivrReader(generator, method.Options.model_validate(config.options))
