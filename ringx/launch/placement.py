"""Which rank is on which host and device: the lines that rank 0 prints at the start."""

import os
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .exchange import gather
from .world import World

MAX_LISTED_HOSTS = 8
# the variables in which a scheduler says which GPUs a process may see
VISIBLE_DEVICES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


class Placement(NamedTuple):
    """Where a rank is."""

    host: str
    device: str
    visible_gpus: int  # how many GPUs it sees
    visible_devices: str | None  # the scheduler's variable


def announce(world: World) -> None:
    """Rank 0 prints on stderr which rank is where, and which GPUs each rank sees.  Collective.
    Prints nothing where all ranks compute on the CPU of one host."""
    on_gpu = world.device.type == "cuda"
    settings = [os.environ[name] for name in VISIBLE_DEVICES if os.environ.get(name)]
    local = Placement(
        host=socket.gethostname(),
        device=str(world.device),
        visible_gpus=torch.cuda.device_count() if on_gpu else 0,
        visible_devices=settings[0] if settings else None,
    )
    placements = gather(local, world)
    if world.rank == 0 and (on_gpu or world.local_world < world.world_size):
        print("\n".join(describe_placement(world, placements)), file=sys.stderr, flush=True)


def describe_placement(world: World, placements: Sequence[Placement]) -> list[str]:
    """The lines that ``announce`` prints, from the placements of all ranks, by rank."""
    ranks_of_host: dict[str, list[int]] = {}
    for rank, placement in enumerate(placements):
        ranks_of_host.setdefault(placement.host, []).append(rank)
    lines = [_headline(world, len(ranks_of_host))]
    visibility = _describe_visibility({placement.visible_gpus for placement in placements})
    if visibility:
        lines.append(visibility)
    for host, ranks in list(ranks_of_host.items())[:MAX_LISTED_HOSTS]:
        devices = ", ".join(_describe_rank(rank, placements[rank]) for rank in ranks)
        lines.append(f"  {host}  {devices}")
    if len(ranks_of_host) > MAX_LISTED_HOSTS:
        lines.append(f"  and {len(ranks_of_host) - MAX_LISTED_HOSTS} hosts more")
    return lines


def _headline(world: World, hosts: int) -> str:
    plural = "" if hosts == 1 else "s"
    text = (
        f"{world.world_size} ranks on {hosts} host{plural}, started by {world.launcher}, "
        f"{world.backend}"
    )
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    if interfaces:
        text += f" over {interfaces}"
    return text


def _describe_visibility(gpu_counts: set[int]) -> str:
    """How many GPUs the ranks see; "" where they see none."""
    if gpu_counts == {0}:
        return ""
    if gpu_counts == {1}:
        return "each rank sees one GPU, the one it computes on"
    fewest = min(gpu_counts)
    most = max(gpu_counts)
    count = str(most) if fewest == most else f"{fewest}-{most}"
    return f"each rank sees all {count} GPUs of its host and computes on that of its local rank"


def _describe_rank(rank: int, placement: Placement) -> str:
    if placement.visible_devices:
        return f"{rank}: {placement.device} of {placement.visible_devices}"
    return f"{rank}: {placement.device}"
