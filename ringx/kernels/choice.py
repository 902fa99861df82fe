"""The table of the kernels, and the choice among them."""

import importlib

from ..checks import require_name
from .protocol import Kernel, KernelRequest

KERNELS = {
    "flash4": "FlashAttention-4 (package flash-attn-4; NVIDIA Hopper and Blackwell)",
    "flash3": "FlashAttention-3 (package flash_attn_interface; NVIDIA Hopper)",
    "flash2": "FlashAttention-2 (package flash-attn; CUDA and ROCm)",
    "aiter": "AMD's AI tensor engine (package amd-aiter; ROCm)",
    "sdpa_flash": "PyTorch's own flash attention (CUDA and ROCm)",
    "sdpa_cudnn": "cuDNN attention through PyTorch (NVIDIA)",
    "sdpa_efficient": "PyTorch's memory-efficient attention (CUDA and ROCm; also fp32)",
    "cpu": "PyTorch's flash attention for CPUs",
    "flex": "PyTorch's flex_attention (CUDA and ROCm; forward only on CPU)",
    "reference": "plain einsum on any device; holds the score matrix",
}  # in the order in which "auto" prefers them


def load(name: str) -> Kernel:
    """The kernel of that name (its file is imported now, optional packages by its ``unsupported_reason``)."""
    return importlib.import_module(f"{__package__}.{require_name(name, KERNELS, 'kernel')}")  # type: ignore[return-value]


def unsupported_reason(name: str, need: KernelRequest) -> str | None:
    """Why kernel `name` cannot serve `need` here; None if it can."""
    return load(name).unsupported_reason(need)


def choose(name: str, need: KernelRequest) -> str:
    """`name` itself if it can serve `need`; for "auto" the first of KERNELS that can (``reference`` only where nothing
    faster exists for that device and dtype).  Raises NotImplementedError with the reasons otherwise."""
    if name != "auto":
        require_name(name, [*KERNELS, "auto"], "kernel")
        if reason := unsupported_reason(name, need):
            raise NotImplementedError(
                f"kernel={name!r} cannot do this: {reason}. `ringx info` lists what can run here."
            )
        return name
    reasons = {}
    for candidate in KERNELS:
        reason = unsupported_reason(candidate, need)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    raise NotImplementedError(
        f"kernel='auto': no kernel does {need.dtype} with head size {need.head_dim} on {need.device.type}: "
        + "; ".join(f"{k}: {v}" for k, v in reasons.items())
    )
