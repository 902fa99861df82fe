"""Local attention kernels: one file each, one protocol, and the choice among them.

A kernel computes attention of q against k and v on one device, with the log-sum-exp, and its
gradient given the global output and log-sum-exp.  No kernel is ever replaced by another silently:
a kernel that cannot do what is asked gives the reason.
"""

from .choice import KERNELS, KernelEntry, choose, load, unsupported_reason
from .cutting import cut
from .protocol import Band, CausalAlignment, Kernel, KernelRequest

__all__ = [
    "KERNELS",
    "Band",
    "CausalAlignment",
    "Kernel",
    "KernelEntry",
    "KernelRequest",
    "choose",
    "cut",
    "load",
    "unsupported_reason",
]
