"""Bytes that really leave the hosts: what the network interface of this group's traffic has sent.

The closed forms (``ringx.comm``) say what an optimal implementation would send.  What a backend puts on the wire is more: its own
algorithm for the collective, headers, acknowledgements.  Linux counts it for each interface, for all processes of the host
together, so the count means something only where nothing else uses that interface.

gloo only: NCCL and RCCL drive cards that count elsewhere (for InfiniBand under /sys/class/infiniband/*/ports/*/counters).
"""

import os
from pathlib import Path

import torch.distributed as dist

from ..launch import World

COUNTERS = Path("/proc/net/dev")


class Meter:
    """Reads the interfaces that gloo uses.  Every rank makes one; the first rank of each host counts for its host."""

    def __init__(self, world: World):
        self.names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        self.missing = self._why_not(world)
        self._counts = self.missing is None and world.local_rank == 0
        self.marks: list[int] = []

    def _why_not(self, world: World) -> str | None:
        if world.world_size == 1:
            return "one rank sends nothing"
        if world.device.type != "cpu" or "gloo" not in world.backend:
            return "only gloo's interfaces are read"
        if world.local_world == world.world_size:
            return "all ranks are on one host"
        if not dist.is_initialized() or not self.names or not COUNTERS.exists():
            return f"the interface is not known, or there is no {COUNTERS}"
        return (
            None
            if set(self.names) <= sent().keys()
            else f"{COUNTERS} has no {', '.join(self.names)}"
        )

    def mark(self) -> None:
        """Notes the counter.  Bytes between two marks: ``between``."""
        if self._counts:
            now = sent()
            self.marks.append(sum(now[name] for name in self.names))
        else:
            self.marks.append(0)

    def between(self, i: int) -> int:
        """Bytes that left this host from mark `i` to the next; 0 on ranks that do not count."""
        return self.marks[i + 1] - self.marks[i]


def sent() -> dict[str, int]:
    """{interface: bytes sent} of this host."""
    rows = (line.split(":", 1) for line in COUNTERS.read_text().splitlines() if ":" in line)
    return {name.strip(): int(numbers.split()[8]) for name, numbers in rows}
