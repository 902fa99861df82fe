"""What a rank knows of itself, and the device that it computes on."""

from dataclasses import dataclass

import torch

from .environ import LauncherInfo


@dataclass(frozen=True)
class World:
    """What a rank must know about itself.  `address` and `port` are where rank 0 is met; "" and 0 for a lone process.

    ``detect`` cannot ask the other ranks: where only mpi4py knows, it says world_size 0, local_rank -1, address "" or port 0."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this host
    local_world: int
    device: torch.device
    backend: (
        str  # of torch.distributed; what it would be for a lone process, which initialises none
    )
    launcher: str  # "torchrun" | "srun" | "mpirun" | "plain" | "ringx"
    address: str
    port: int

    @property
    def world(self) -> int:
        """`world_size`, under the name that it had before."""
        return self.world_size


def _kind(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={device!r} must be 'auto', 'cpu' or 'cuda' (each rank takes the GPU of its local rank)."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no GPU here; check the driver, CUDA_VISIBLE_DEVICES, or take 'cpu'."
        )
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def bind_device(device: str, local_rank: int, local_world: int, launcher: str) -> torch.device:
    """The CPU; or GPU `local_rank` where all are visible, the only one where the scheduler shows each rank its own."""
    if _kind(device) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_world > count and (count > 1 or launcher == "ringx"):
        raise ValueError(
            f"{local_world} ranks on this host would share {count} GPU{'s' if count > 1 else ''}: start at most {count} per host, "
            "let the scheduler show each rank one GPU (srun --gpus-per-task=1), or take device='cpu'."
        )
    return torch.device("cuda", max(local_rank, 0) % count)


def _world(f: LauncherInfo, device: str) -> World:
    bound = bind_device(device, f.local_rank, f.local_world, f.launcher)
    backend = "cpu:gloo,cuda:nccl" if bound.type == "cuda" else "gloo"
    return World(
        f.rank,
        f.world_size,
        f.local_rank,
        f.local_world,
        bound,
        backend,
        f.launcher,
        f.address,
        f.port,
    )
