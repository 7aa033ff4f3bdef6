"""What precision the forward pass computes in."""

from __future__ import annotations

from pathlib import Path

import torch


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in; None for float32 throughout.

    Raises:
        ValueError: the GPU has no bfloat16.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not has_bf16:
        raise ValueError("--amp bf16: this GPU has no bfloat16; pass --amp fp16 or off")
    if amp == "auto":
        is_fast = has_bf16 if device.type == "cuda" else device.type == "cpu" and cpu_computes_bf16()
        amp = "bf16" if is_fast else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def cpu_computes_bf16() -> bool:
    """Whether the processor multiplies in bfloat16; others convert, which is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)  # the last one is ARM's
