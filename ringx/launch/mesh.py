"""One named DeviceMesh for context, tensor and data parallelism, in any order of the ranks.

A rank has one index along each of three axes: cp (its part of the sequence), tp (its part of each matrix), dp (its sequences of
the batch).  ``order`` says how the axes are laid over the ranks, the leftmost varying fastest: with "cp-tp-dp" the ranks of a
context-parallel group are neighbours, on one node where they fit.

dp is in turn replicate x shard: parameters are sharded over `shard` x cp and replicated `replicate` times (HSDP).
"""

import warnings
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

AXES = ("cp", "tp", "dp")
ORDERS = tuple("-".join(p) for p in permutations(AXES))


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes.  dp counts replicas x shards; replicate divides it."""

    cp: int = 1
    tp: int = 1
    dp: int = 1
    replicate: int = 1
    order: str = "cp-tp-dp"

    def __post_init__(self):
        for axis in (*AXES, "replicate"):
            value = getattr(self, axis)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{axis}={value!r} must be an integer of at least 1.")
        if self.dp % self.replicate:
            raise ValueError(
                f"replicate={self.replicate} must divide dp={self.dp}: dp is replicas x shards."
            )
        if self.order not in ORDERS:
            raise ValueError(
                f"order={self.order!r} must name cp, tp and dp once each: {', '.join(ORDERS)}."
            )

    @property
    def world_size(self) -> int:
        return self.cp * self.tp * self.dp

    @classmethod
    def fit(
        cls,
        world: int,
        *,
        cp: int = 0,
        tp: int = 0,
        dp: int = 0,
        replicate: int = 1,
        order: str = "cp-tp-dp",
    ) -> "Shape":
        """The shape of `world` ranks; of the axes left at 0, dp takes what is left if cp is given, cp otherwise; others are 1.

        Raises ValueError if the axes do not multiply to world."""
        if not dp and cp:
            dp = max(1, world // (cp * max(tp, 1)))
        tp, dp = tp or 1, dp or 1
        cp = cp or max(1, world // (tp * dp))
        shape = cls(cp, tp, dp, replicate, order)
        if shape.world_size != world:
            raise ValueError(
                f"cp={cp} x tp={tp} x dp={dp} is {shape.world_size} ranks, but there are {world}; change one of them."
            )
        return shape

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Axes of the mesh: "replicate", then "shard" and "cp", the slower one first, then "tp"."""
        order = self.order.split("-")
        cp_fast = order.index("cp") < order.index("dp")
        return ("replicate", "shard", "cp", "tp") if cp_fast else ("replicate", "cp", "shard", "tp")

    def ranks(self) -> torch.Tensor:
        """int64 over the axes ``names``: the global rank at each place."""
        sizes = {"cp": self.cp, "tp": self.tp, "dp": self.dp}
        slow_to_fast = self.order.split("-")[::-1]
        grid = torch.arange(self.world_size).view([sizes[axis] for axis in slow_to_fast])
        grid = grid.permute([slow_to_fast.index(axis) for axis in ("dp", "cp", "tp")])
        grid = grid.reshape(self.replicate, self.dp // self.replicate, self.cp, self.tp)
        return grid if self.names[1] == "shard" else grid.transpose(1, 2)

    def describe(self, rows: int = 16) -> str:
        """The rank map, a line per place along the slower axes, for people."""
        fast, *slow = self.order.split("-")
        sizes = {"cp": self.cp, "tp": self.tp, "dp": self.dp}
        lines = [
            f"mesh: cp {self.cp} x tp {self.tp} x dp {self.dp} ({self.replicate} replicas), {self.world_size} ranks, order {self.order}"
        ]
        number = self.world_size // sizes[fast]
        for i in range(min(number, rows)):
            first, second = i % sizes[slow[0]], i // sizes[slow[0]]
            start = i * sizes[fast]
            span = str(start) if sizes[fast] == 1 else f"{start}..{start + sizes[fast] - 1}"
            lines.append(
                f"  {slow[1]} {second}  {slow[0]} {first}:  {fast} 0..{sizes[fast] - 1} = ranks {span}"
            )
        if number > rows:
            lines.append(f"  ... and {number - rows} more groups")
        return "\n".join(lines)


@dataclass(frozen=True)
class Mesh:
    """The process groups of one rank.  Made by every rank (collective); a mesh of one rank has no groups."""

    shape: Shape
    cp_rank: int
    tp_rank: int
    dp_rank: int
    device_mesh: DeviceMesh | None = None  # axes shape.names
    shard_mesh: DeviceMesh | None = (
        None  # what FSDP2 shards over: shard x cp, or (replicate, shard x cp)
    )
    data_mesh: DeviceMesh | None = None  # dp x cp

    @classmethod
    def make(cls, shape: Shape, device_type: str = "cpu", rank: int | None = None) -> "Mesh":
        """The mesh over the default process group, whose size must be the shape's; without one, of a lone rank."""
        started = dist.is_available() and dist.is_initialized()
        world = dist.get_world_size() if started else 1
        if world != shape.world_size:
            raise ValueError(
                f"cp={shape.cp} x tp={shape.tp} x dp={shape.dp} is {shape.world_size} ranks, but there are {world}."
            )
        if not started:
            return cls(shape, 0, 0, 0)
        # The order of the axes is in the ranks, not in the names: torch slices a mesh only in the order of its axes.  But shard and
        # cp, which become one axis, must ascend together: a process group sorts its ranks, and FSDP2 would gather them otherwise.
        mesh = DeviceMesh(device_type, shape.ranks(), mesh_dim_names=shape.names)
        place = dict(zip(shape.names, mesh.get_coordinate() or (), strict=True))
        shards, data = (
            mesh[shape.names[1:3]]._flatten("fsdp"),
            mesh[shape.names[:3]]._flatten("data"),
        )
        if shape.replicate > 1:
            with (
                warnings.catch_warnings()
            ):  # torch announces another way to name a flattened axis, and does not have it yet
                warnings.simplefilter("ignore", UserWarning)
                shards = mesh["replicate", "fsdp"]
        dp_rank = place["replicate"] * (shape.dp // shape.replicate) + place["shard"]
        return cls(shape, place["cp"], place["tp"], dp_rank, mesh, shards, data)

    @property
    def cp(self) -> "dist.ProcessGroup | None":
        """The group along the sequence; None on a lone rank, as for the others."""
        return self.device_mesh["cp"].get_group() if self.device_mesh is not None else None

    @property
    def data(self) -> "dist.ProcessGroup | None":
        """The ranks that hold different tokens: dp x cp.  Losses and gradients are summed over them."""
        return self.data_mesh.get_group() if self.data_mesh is not None else None
