"""Installed as `sitecustomize.py` of vLLM's environment by make, where every process of vLLM loads it.

torchvision as package indexes hold it is built for CUDA's torch and cannot load its operators beside torch for the
CPU; then it fails at import, because it describes two of them that it has not got. Declared beforehand, without code,
they let the import pass. vLLM uses its image transforms, which are plain torch, and no operator.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is first asked for; finds nothing itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare()


def _declare() -> None:
    import torch

    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
