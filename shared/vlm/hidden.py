"""Hidden states of every layer of one pass, without asking the model to keep them.

Legend: B rows, T row length, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def hidden_states(decoder: Any) -> Iterator[list[Tensor]]:
    """Collects the input embeddings and the output of every layer of one pass, (B, T, D) each."""
    states: list[Tensor] = []

    def before(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(_module: Any, _arguments: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in decoder.layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
