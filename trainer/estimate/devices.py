"""What a device can do at most, and the share of it that models like these reach.

Seconds of a pass = operations / (peak · efficiency) + bytes moved / bandwidth + layers · overhead. Bytes moved are
`moves` times the activations that autograd keeps, plus the weights once: norms, activations, rotary embeddings and
casts are limited by memory, not by arithmetic.

Peaks of GPUs are dense ones from NVIDIA's data sheets, which print them with sparsity for newer cards (halved here).
float32 is the ordinary one: PyTorch leaves TF32 off unless it is asked for.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from shared.errors import ConfigError
from shared.vlm.model import DTYPES


@dataclass(frozen=True, slots=True)
class Device:
    """peak: operations per second by dtype; bandwidth: bytes per second; layer_overhead_s: per layer and pass.

    efficiency: share of peak that matrix products reach; moves: see above.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    memory_bytes: float
    efficiency: float
    moves: float
    layer_overhead_s: float

    def product_rate(self, dtype: str) -> float:
        """Operations per second that matrix products reach."""
        return self.peak[dtype] * self.efficiency


# Not measured: nobody has run this on a GPU yet. 52 % of peak in all is what training of large language models
# reaches on an A100 (Narayanan et al. 2021, arXiv 2104.04473, table 1); these numbers come to 45–55 % at 7 billion
# parameters and a thousand tokens per call. Launching kernels is taken to be faster than running them.
_GPU_EFFICIENCY = 0.65
_GPU_MOVES = 4.0


def _gpu(name: str, bfloat16: float, float32: float, bandwidth: float, memory: float) -> Device:
    """From TFLOP/s, GB/s and GB."""
    peak = {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}
    return Device(name, peak, bandwidth * 1e9, memory * 1e9, _GPU_EFFICIENCY, _GPU_MOVES, 0.0)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A (RTX A6000)
        _gpu("A6000", bfloat16=154.8, float32=38.7, bandwidth=768, memory=48),
        # NVIDIA L40S data sheet: 362.05 | 733 with sparsity
        _gpu("L40S", bfloat16=362.05, float32=91.6, bandwidth=864, memory=48),
        # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM: 312 | 624 with sparsity
        _gpu("A100", bfloat16=312, float32=19.5, bandwidth=2039, memory=80),
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 with sparsity
        _gpu("H100", bfloat16=989.5, float32=67, bandwidth=3350, memory=80),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: 1,979 with sparsity
        _gpu("H200", bfloat16=989.5, float32=67, bandwidth=4800, memory=141),
    )
}


def gpu_named(name: str | None) -> Device | None:
    """The GPU of that name; without one, this machine's. None: no GPU here, or one that the table lacks."""
    if name is not None:
        if name not in GPUS:
            raise ConfigError(f"--device {name}: not in the table; use one of {', '.join(GPUS)}")
        return GPUS[name]
    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_name()
    return next((gpu for gpu in GPUS.values() if gpu.name in here), None)


@functools.cache
def this_cpu(dtype: str, threads: int) -> Device:
    """This machine's CPU with so many threads, measured in under a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n, n_copied = 512, 2**26  # more than a cache holds
        left, right = torch.randn(2, n, n).to(DTYPES[dtype])
        source, target = torch.ones(2, n_copied, dtype=torch.uint8)
        peak = 2 * n**3 / _best_s(lambda: left @ right)
        bandwidth = 2 * n_copied / _best_s(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return replace(_CPU, peak={dtype: peak}, bandwidth=bandwidth, memory_bytes=memory)


# Fitted to reads and generator steps of widths 64 to 1024 on a core of an AMD EPYC (Zen 4). In all, a model of width
# 256 then reaches 40 to 65 % of the peak, one of width 1024 65 to 80 %; tests/benchmarks/estimate_check.py measures.
_CPU = Device("CPU", {}, 0.0, 0.0, 0.93, 8.0, 1e-3)


def _best_s(call: Callable[[], object], budget_s: float = 0.2) -> float:
    """Seconds of the fastest of as many calls as fit into the budget: the others were disturbed."""
    call()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget_s:
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best
