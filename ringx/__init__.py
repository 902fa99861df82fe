"""ringx: exact attention over sequences too long for one GPU, cut over the ranks of a
context-parallel group.

    out = ringx.attention(q, k, v, group=cp, algorithm="ringx3", causal=True)

The whole public surface is on this screen; ``ringx.launch`` starts ranks, ``python -m ringx`` is
the command line.
"""

from . import comm, launch
from .api import attention
from .layout import Sharding
from .patterns.registry import Algorithm, algorithms
from .sharding import positions, shard, unshard

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Sharding",
    "algorithms",
    "attention",
    "comm",
    "launch",
    "positions",
    "shard",
    "unshard",
]
