"""Who is where: the lines that rank 0 prints at the start."""

import os
import socket
import sys
from collections.abc import Sequence

import torch

from .exchange import gather
from .world import World

ANNOUNCED = 8  # hosts that announce() names

VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def announce(world: World) -> None:
    """Rank 0 says on stderr who is where, and which GPUs each rank sees.  Collective; silent where ranks are on one host's CPU."""
    visible = next((os.environ[name] for name in VISIBLE if os.environ.get(name)), None)
    count = torch.cuda.device_count() if world.device.type == "cuda" else 0
    mine = (socket.gethostname(), str(world.device), count, visible)
    everyone = gather(mine, world)
    if world.rank == 0 and (world.device.type == "cuda" or world.local_world < world.world_size):
        print("\n".join(described(world, everyone)), file=sys.stderr, flush=True)


def described(world: World, everyone: Sequence[tuple[str, str, int, str | None]]) -> list[str]:
    """The lines of ``announce``, from every rank's (host, device, number of GPUs it sees, what the scheduler's variable says)."""
    hosts: dict[str, list[int]] = {}
    for rank, (host, *_) in enumerate(everyone):
        hosts.setdefault(host, []).append(rank)
    lines = [
        f"{world.world_size} ranks on {len(hosts)} host{'s'[: len(hosts) != 1]}, started by {world.launcher}, {world.backend}"
    ]
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        lines[0] += f" over {interfaces}"
    counts = {count for _, _, count, _ in everyone}
    if counts == {1}:
        lines.append("each rank sees one GPU, the one it computes on")
    elif counts != {0}:
        seen = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
        lines.append(
            f"each rank sees all {seen} GPUs of its host and computes on that of its local rank"
        )
    for host, ranks in list(hosts.items())[:ANNOUNCED]:
        says = [
            f"{r}: {everyone[r][1]}" + (f" of {everyone[r][3]}" if everyone[r][3] else "")
            for r in ranks
        ]
        lines.append(f"  {host}  " + ", ".join(says))
    if len(hosts) > ANNOUNCED:
        lines.append(f"  and {len(hosts) - ANNOUNCED} hosts more")
    return lines
