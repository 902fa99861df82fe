"""The table of kernels, and the choice among them."""

from typing import NamedTuple

from ..checks import require_name
from . import (
    aiter,
    cpu,
    flash2,
    flash3,
    flash4,
    flex,
    reference,
    sdpa_cudnn,
    sdpa_efficient,
    sdpa_flash,
)
from .protocol import Kernel, KernelRequest


class KernelEntry(NamedTuple):
    """One row of the table: the kernel's module, and what it is."""

    kernel: Kernel
    description: str


KERNELS: dict[str, KernelEntry] = {
    "flash4": KernelEntry(
        flash4, "FlashAttention-4 (package flash-attn-4; NVIDIA Hopper and Blackwell)"
    ),
    "flash3": KernelEntry(flash3, "FlashAttention-3 (package flash_attn_interface; NVIDIA Hopper)"),
    "flash2": KernelEntry(flash2, "FlashAttention-2 (package flash-attn; CUDA and ROCm)"),
    "aiter": KernelEntry(aiter, "AMD's AI tensor engine (package amd-aiter; ROCm)"),
    "sdpa_flash": KernelEntry(sdpa_flash, "PyTorch's own flash attention (CUDA and ROCm)"),
    "sdpa_cudnn": KernelEntry(sdpa_cudnn, "cuDNN attention through PyTorch (NVIDIA)"),
    "sdpa_efficient": KernelEntry(
        sdpa_efficient, "PyTorch's memory-efficient attention (CUDA and ROCm; also fp32)"
    ),
    "cpu": KernelEntry(cpu, "PyTorch's flash attention for CPUs"),
    "flex": KernelEntry(flex, "PyTorch's flex_attention (CUDA and ROCm; forward only on CPU)"),
    "reference": KernelEntry(reference, "plain einsum on any device; holds the score matrix"),
}
"""In the order in which "auto" prefers them.

The modules import torch only; ``unsupported_reason`` imports a kernel's optional package.
"""


def load(name: str) -> Kernel:
    """The kernel of that name; ValueError for an unknown one."""
    return KERNELS[require_name(name, KERNELS, "kernel")].kernel


def unsupported_reason(name: str, request: KernelRequest) -> str | None:
    """Why kernel `name` cannot serve the request here; None if it can."""
    return load(name).unsupported_reason(request)


def choose(name: str, request: KernelRequest) -> str:
    """The name of the kernel that serves the request.

    That is `name` itself, or for "auto" the first of KERNELS that can (``reference`` only where
    nothing faster exists for that device and dtype).  Raises ValueError for an unknown name, and
    NotImplementedError with the reasons where no kernel can serve the request.
    """
    if name != "auto":
        require_name(name, [*KERNELS, "auto"], "kernel")
        if reason := unsupported_reason(name, request):
            raise NotImplementedError(
                f"kernel={name!r} cannot do this: {reason}. `ringx info` lists what can run here."
            )
        return name
    reasons = {}
    for candidate in KERNELS:
        reason = unsupported_reason(candidate, request)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    all_reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise NotImplementedError(
        f"kernel='auto': no kernel does {request.dtype} with head size {request.head_dim} "
        f"on {request.device.type}: {all_reasons}"
    )
