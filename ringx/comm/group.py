"""A process group as one of its ranks sees it, and the errors that name a rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


class PeerError(RuntimeError):
    """A message failed: a peer died, raised, or did not make this call within the group's
    timeout."""


class Disagreement(ValueError):
    """Another rank refused this call, or made a different one (``check=True``)."""


@dataclass(frozen=True)
class Group:
    """A process group as one of its ranks sees it; `pg` is None where there are no peers to talk
    to.

    Ranks are counted within the group everywhere in ringx; global ranks appear in ringx.comm
    only."""

    pg: dist.ProcessGroup | None
    rank: int
    world_size: int
    global_ranks: tuple[int, ...]  # of each rank of the group

    @classmethod
    def of(cls, group: "dist.ProcessGroup | Group | None") -> "Group":
        """`group`, or the default group for None; one lone rank where no group was initialised.

        Raises:
            TypeError: it is no process group.
            ValueError: this rank is not a member of it."""
        if isinstance(group, Group):
            return group
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return cls(pg=None, rank=0, world_size=1, global_ranks=(0,))
            group = dist.group.WORLD
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(_NO_MEMBER)
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group={group!r} must be a torch.distributed.ProcessGroup or None, "
                f"not {type(group).__name__}; of a DeviceMesh pass mesh['cp'].get_group()."
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(_NO_MEMBER)
        global_ranks = tuple(dist.get_process_group_ranks(group))
        return cls(group, rank, len(global_ranks), global_ranks)

    @classmethod
    def without_peers(cls, rank: int, world_size: int) -> "Group":
        """Rank `rank` of a group that exists on paper, or whose ranks are threads of this process:
        globally all of them are this process's rank, whose ``traffic`` counts them."""
        own_rank = cls.of(None).global_rank
        return cls(None, rank, world_size, (own_rank,) * world_size)

    @property
    def global_rank(self) -> int:
        """This rank's global rank."""
        return self.global_ranks[self.rank]


_NO_MEMBER = "group: this rank is not a member of the group; call only on its members."

_companions: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def cpu_group(group: Group) -> dist.ProcessGroup:
    """A group of the same ranks (at least two) that can move CPU tensors.  Collective the first
    time, where it must be made."""
    pg = group.pg
    assert pg is not None
    if torch.device("cpu") in pg._device_types:
        return pg
    known = _companions.get(id(pg))
    if known is None or known[0] is not pg:  # untested on NCCL and RCCL: no GPU was at hand
        ranks = list(group.global_ranks)
        companion = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        known = (pg, companion)
        _companions[id(pg)] = known
    return known[1]
