"""One named DeviceMesh for context, tensor and data parallelism, in any order of the ranks.

A rank has one index along each of three axes: cp (its part of the sequence), tp (its part of each
matrix), dp (its sequences of the batch).  ``order`` says how the axes are laid over the ranks, the
leftmost varying fastest: with "cp-tp-dp" the ranks of a context-parallel group are neighbours, on
one node where they fit.

dp is in turn replicate x shard: parameters are sharded over `shard` x cp and replicated `replicate`
times (HSDP).
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

    def __post_init__(self) -> None:
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
        """Number of ranks."""
        return self.cp * self.tp * self.dp

    @classmethod
    def fit(
        cls,
        world_size: int,
        *,
        cp: int = 0,
        tp: int = 0,
        dp: int = 0,
        replicate: int = 1,
        order: str = "cp-tp-dp",
    ) -> "Shape":
        """The shape of `world_size` ranks.  Of the axes left at 0, dp takes the ranks that are left
        if cp is given, cp does otherwise, and the others are 1.

        Raises:
            ValueError: the axes do not multiply to `world_size`."""
        tp = tp or 1
        if not dp:
            dp = max(1, world_size // (cp * tp)) if cp else 1
        if not cp:
            cp = max(1, world_size // (tp * dp))
        shape = cls(cp, tp, dp, replicate, order)
        if shape.world_size != world_size:
            raise ValueError(
                f"cp={cp} x tp={tp} x dp={dp} is {shape.world_size} ranks, "
                f"but there are {world_size}; change one of them."
            )
        return shape

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Axes of the mesh: "replicate", then "shard" and "cp", the slower one first, then "tp"."""
        order = self.order.split("-")
        if order.index("cp") < order.index("dp"):  # cp varies faster
            return ("replicate", "shard", "cp", "tp")
        return ("replicate", "cp", "shard", "tp")

    def ranks(self) -> torch.Tensor:
        """int64 over the axes ``names``: the global rank at each place."""
        sizes = {"cp": self.cp, "tp": self.tp, "dp": self.dp}
        slow_to_fast = self.order.split("-")[::-1]
        grid = torch.arange(self.world_size).view([sizes[axis] for axis in slow_to_fast])
        grid = grid.permute([slow_to_fast.index(axis) for axis in ("dp", "cp", "tp")])
        grid = grid.reshape(self.replicate, self.dp // self.replicate, self.cp, self.tp)
        return grid if self.names[1] == "shard" else grid.transpose(1, 2)

    def describe(self, rows: int = 16) -> str:
        """The rank map for people: a line for each group of ranks along the fastest axis."""
        fastest, middle, slowest = self.order.split("-")
        sizes = {"cp": self.cp, "tp": self.tp, "dp": self.dp}
        length = sizes[fastest]
        lines = [
            f"mesh: cp {self.cp} x tp {self.tp} x dp {self.dp} ({self.replicate} replicas), "
            f"{self.world_size} ranks, order {self.order}"
        ]
        groups = self.world_size // length
        for group in range(min(groups, rows)):
            slowest_index, middle_index = divmod(group, sizes[middle])
            first = group * length
            ranks = str(first) if length == 1 else f"{first}..{first + length - 1}"
            lines.append(
                f"  {slowest} {slowest_index}  {middle} {middle_index}:  "
                f"{fastest} 0..{length - 1} = ranks {ranks}"
            )
        if groups > rows:
            lines.append(f"  ... and {groups - rows} more groups")
        return "\n".join(lines)


@dataclass(frozen=True)
class Mesh:
    """The process groups of one rank.

    Made by every rank (collective); a mesh of one rank has no groups."""

    shape: Shape
    cp_rank: int
    tp_rank: int
    dp_rank: int
    device_mesh: DeviceMesh | None = None  # axes shape.names
    # what FSDP2 shards over: shard x cp, or (replicate, shard x cp)
    shard_mesh: DeviceMesh | None = None
    data_mesh: DeviceMesh | None = None  # dp x cp

    @classmethod
    def make(cls, shape: Shape, device_type: str = "cpu", rank: int | None = None) -> "Mesh":
        """The mesh over the default process group; without one, of a lone rank.

        Raises:
            ValueError: the group has not as many ranks as the shape."""
        initialized = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if initialized else 1
        if world_size != shape.world_size:
            raise ValueError(
                f"cp={shape.cp} x tp={shape.tp} x dp={shape.dp} is {shape.world_size} ranks, "
                f"but there are {world_size}."
            )
        if not initialized:
            return cls(shape, 0, 0, 0)
        # The order of the axes is in the ranks, not in the names: torch slices a mesh only in the
        # order of its axes.  But shard and cp, which become one axis, must ascend together: a
        # process group sorts its ranks, and FSDP2 would gather them in another order otherwise.
        device_mesh = DeviceMesh(device_type, shape.ranks(), mesh_dim_names=shape.names)
        coordinate = dict(zip(shape.names, device_mesh.get_coordinate() or (), strict=True))
        shard_mesh = device_mesh[shape.names[1:3]]._flatten("fsdp")
        data_mesh = device_mesh[shape.names[:3]]._flatten("data")
        if shape.replicate > 1:
            with warnings.catch_warnings():
                # torch announces another way to name a flattened axis, and does not have it yet
                warnings.simplefilter("ignore", UserWarning)
                shard_mesh = device_mesh["replicate", "fsdp"]
        shards = shape.dp // shape.replicate
        return cls(
            shape,
            cp_rank=coordinate["cp"],
            tp_rank=coordinate["tp"],
            dp_rank=coordinate["replicate"] * shards + coordinate["shard"],
            device_mesh=device_mesh,
            shard_mesh=shard_mesh,
            data_mesh=data_mesh,
        )

    @property
    def cp(self) -> "dist.ProcessGroup | None":
        """The group along the sequence; None on a lone rank."""
        if self.device_mesh is None:
            return None
        return self.device_mesh["cp"].get_group()

    @property
    def data(self) -> "dist.ProcessGroup | None":
        """The ranks that hold different tokens: dp x cp.  Losses and gradients are summed over
        them. None on a lone rank."""
        if self.data_mesh is None:
            return None
        return self.data_mesh.get_group()
