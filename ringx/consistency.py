"""Do all ranks make the same call?  One small all-gather on the CPU before anything large is sent.

It runs on every checked call: a remembered answer would itself hang when one rank remembers and another does not.  Where the
group cannot move CPU tensors (nccl alone) a gloo companion group carries it, so that the GPU is never waited for.
"""

import json

import torch
import torch.distributed as dist

from .comm import Disagreement, Group, Pending

SIZE = 1024  # bytes a rank sends
_companions: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def check_consistency(group: Group, mine: dict[str, object], error: Exception | None) -> None:
    """Raises on every rank if some rank has an `error` (its own as it is) or a different `mine`; returns otherwise."""
    if group.world_size > 1:
        said = {"error": f"{type(error).__name__}: {error}"[: SIZE - 64]} if error else mine
        text = json.dumps(said, ensure_ascii=True).encode()[:SIZE].ljust(SIZE)
        words = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everyone = _gather(words, group)
        if error is None and not bool((everyone == words).all()):
            _explain(group, [bytes(row.tolist()) for row in everyone])
    if error is not None:
        raise error


def _gather(words: torch.Tensor, group: Group) -> torch.Tensor:
    out = words.new_empty((group.world_size, SIZE))
    gather = getattr(
        dist, "all_gather_single", dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    pg = cpu_group(group)
    return Pending(
        group,
        "comparing the call with the other ranks (check=True)",
        lambda: gather(out.view(-1), words, group=pg, async_op=True),
        out,
    ).wait()


def cpu_group(group: Group) -> dist.ProcessGroup:
    """A group of the same ranks (at least two) that can move CPU tensors.  Collective the first time, where it has to be made."""
    pg = group.pg
    assert pg is not None
    if torch.device("cpu") in pg._device_types:
        return pg
    known = _companions.get(id(pg))
    if (
        known is None or known[0] is not pg
    ):  # untested on nccl/rccl: no GPU was at hand when this was written
        known = (
            pg,
            dist.new_group(list(group.ranks), backend="gloo", use_local_synchronization=True),
        )
        _companions[id(pg)] = known
    return known[1]


def _explain(group: Group, rows: list[bytes]) -> None:
    said = []
    for rank, row in enumerate(rows):
        try:
            said.append(json.loads(row))
        except ValueError:  # an error message cut at SIZE
            said.append({"error": row.decode(errors="replace").strip()})
        if "error" in said[-1]:
            raise Disagreement(
                f"rank {rank} of the group (global rank {group.ranks[rank]}) refused this call: {said[-1]['error']}"
            )
    for what, value in said[group.rank].items():
        for rank, other in enumerate(said):
            if other.get(what) != value:
                raise Disagreement(
                    f"ranks disagree on {what}: rank {group.rank} has {value!r}, rank {rank} has {other.get(what)!r}; "
                    "every rank of the group must make the same call."
                )
