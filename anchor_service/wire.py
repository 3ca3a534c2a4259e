"""How a read travels between processes: tensors as NumPy arrays, which Ray's object store shares without a copy.

bfloat16, which NumPy lacks, travels as its 16-bit patterns under its name.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.messages import ReadReply, ReadRequest


@dataclass(frozen=True, slots=True)
class WireReply:
    """A reply without its gradient tensor, the gradient beside it.

    process_token: differs between two processes of the same actor; the pool counts incarnations by it.
    """

    reply: ReadReply
    gradient: np.ndarray | None
    gradient_dtype: str
    process_token: int


def to_array(tensor: Tensor) -> tuple[np.ndarray, str]:
    """A CPU array that shares memory where it can, and the dtype's name."""
    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy(), name


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that `to_array` took apart, on the array's own memory: one from the object store is read-only."""
    with warnings.catch_warnings():
        # PyTorch knows no read-only tensors; nothing here writes into latents or gradients that came by wire.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def pack_reply(reply: ReadReply, process_token: int) -> WireReply:
    """Take the gradient out of a reply for the trip."""
    if reply.latents_grad is None:
        return WireReply(reply, None, "", process_token)
    array, dtype = to_array(reply.latents_grad)
    return WireReply(replace(reply, latents_grad=None), array, dtype, process_token)


def unpack_reply(wire: WireReply, incarnation: int) -> ReadReply:
    """Put the gradient back and write the incarnation in."""
    gradient = None if wire.gradient is None else to_tensor(wire.gradient, wire.gradient_dtype)
    return replace(wire.reply, latents_grad=gradient, incarnation=incarnation)


def slice_request(request: ReadRequest, start: int, stop: int, part: str) -> ReadRequest:
    """Images start … stop of a request, without the latents, which travel on their own."""
    weights: Any = request.token_weights
    return replace(
        request,
        request_id=f"{request.request_id}/{part}",
        questions=request.questions[start:stop],
        latents=None,
        token_weights=None if weights is None else weights[start:stop],
    )
