"""Matrix products in full precision by the faster of torch's two libraries.

On an x86 CPU torch hands float32 products to MKL, which on AMD's processors leaves AVX-512 unused: oneDNN, which torch
ships too and uses for bfloat16, takes half the time there (benchmarks/eval.py prints both). The choice hangs on the
processor alone, never on a measurement, so that the same machine always gives the same bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as _linear


def linear(x_BI: Tensor, W_OI: Tensor, b_O: Tensor | None = None) -> Tensor:
    """x W^T + b: [..., O] of x [..., I], W [O, I] (a transposed view is as good) and b [O]."""
    if x_BI.dtype == W_OI.dtype == torch.float32 and x_BI.device.type == "cpu" and onednn_is_faster():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x_BI, W_OI, b_O, "none", [], "")
        return found
    return _linear(x_BI, W_OI, b_O)


@cache
def onednn_is_faster() -> bool:
    """On AMD's processors with AVX-512, if this torch has the operator."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    if "AuthenticAMD" not in facts or "avx512f" not in facts:
        return False
    try:
        torch.ops.mkldnn._linear_pointwise(torch.ones(1, 1), torch.ones(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError):  # it is not part of torch's public interface
        return False
    return True


def half_is_faster(device: torch.device) -> bool:
    """Whether the hardware multiplies half precision (float16 on a GPU, bfloat16 elsewhere) faster than single."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
