"""Bytes that really leave the hosts: what the network interface of this group's traffic has sent.

The closed forms (``ringx.comm.collectives``) give what an optimal implementation would send.  What
a backend puts on the wire is more: its own algorithm for the collective, headers, acknowledgements.
Linux counts it for each interface, for all processes of the host together, so the count means
something only where nothing else uses that interface.

gloo only: NCCL and RCCL drive cards that count elsewhere (for InfiniBand under
/sys/class/infiniband/*/ports/*/counters).
"""

import os
from pathlib import Path

import torch.distributed as dist

from ..launch import World

COUNTERS = Path("/proc/net/dev")


class Meter:
    """Reads the interfaces that gloo uses.  Every rank makes one; the first rank of each host
    counts for its host.

    `missing` says why nothing can be counted; it is None where something can."""

    def __init__(self, world: World) -> None:
        self.names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        self.missing = self._why_missing(world)
        self._counts = self.missing is None and world.local_rank == 0
        self.marks: list[int] = []

    def _why_missing(self, world: World) -> str | None:
        if world.world_size == 1:
            return "one rank sends nothing"
        if world.device.type != "cpu" or "gloo" not in world.backend:
            return "only gloo's interfaces are read"
        if world.local_world == world.world_size:
            return "all ranks are on one host"
        if not dist.is_initialized() or not self.names or not COUNTERS.exists():
            return f"the interface is not known, or there is no {COUNTERS}"
        if not set(self.names) <= sent().keys():
            return f"{COUNTERS} has no {', '.join(self.names)}"
        return None

    def mark(self) -> None:
        """Notes the counters.  Bytes between two marks: ``between``."""
        if not self._counts:
            self.marks.append(0)
            return
        counters = sent()
        self.marks.append(sum(counters[name] for name in self.names))

    def between(self, mark: int) -> int:
        """Bytes that left this host from mark number `mark` to the next; 0 on ranks that do not
        count."""
        return self.marks[mark + 1] - self.marks[mark]


def sent() -> dict[str, int]:
    """{interface: bytes sent} of this host."""
    counters = {}
    for line in COUNTERS.read_text().splitlines():
        name, colon, numbers = line.partition(":")
        if colon:  # not a heading
            counters[name.strip()] = int(numbers.split()[8])
    return counters
