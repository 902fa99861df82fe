"""Local attention kernels: one file each, one protocol, and the choice among them.

A kernel computes attention of q against k, v on one device, with the log-sum-exp, and its gradient given the global
output and log-sum-exp.  Nothing falls back silently: a kernel that cannot do what is asked says why.
"""

from .choice import KERNELS, choose, load, unsupported_reason
from .cutting import cut
from .protocol import Band, Kernel, KernelRequest

__all__ = [
    "KERNELS",
    "Band",
    "Kernel",
    "KernelRequest",
    "choose",
    "cut",
    "load",
    "unsupported_reason",
]
