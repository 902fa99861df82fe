"""Small Python objects that ranks give each other."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .world import World


def decide(world: World | None, ask: Callable[[], Any]) -> Any:
    """Rank 0's ask() on every rank: for what the ranks may see differently, such as files.  A ValueError or OSError of rank 0 is
    raised on every rank.  `world` None is a process without peers."""
    if world is None or world.world_size == 1:
        return ask()
    told: list[Any] = [None]
    if world.rank == 0:
        try:
            told = [(ask(), None)]
        except (ValueError, OSError) as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, 0)
    answer, refusal = told[0]
    if refusal is not None:
        raise refusal
    return answer


def gather(mine: Any, world: World) -> list[Any]:
    """What every rank has, by rank; on every rank."""
    everyone = [mine] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone
