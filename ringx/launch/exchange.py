"""Small Python objects that ranks give each other."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .world import World


def decide(world: World | None, compute: Callable[[], Any]) -> Any:
    """The result of compute() on rank 0, on every rank: for what the ranks may see differently,
    such as files.  Only rank 0 calls it.

    Args:
        world: None is a process without peers.

    Raises:
        ValueError, OSError: those that compute() raised on rank 0, on every rank."""
    if world is None or world.world_size == 1:
        return compute()
    outcome: list[Any] = [None]  # (result, its error), in a list that the broadcast fills
    if world.rank == 0:
        try:
            outcome = [(compute(), None)]
        except (ValueError, OSError) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, 0)
    result, refusal = outcome[0]
    if refusal is not None:
        raise refusal
    return result


def gather(local: Any, world: World) -> list[Any]:
    """The `local` objects of all ranks, by rank, on every rank.  They must be picklable."""
    gathered = [local] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(gathered, local)
    return gathered
