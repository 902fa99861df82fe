"""What a rank knows of itself, and the device that it computes on."""

from dataclasses import dataclass

import torch

from .environ import LauncherInfo


@dataclass(frozen=True)
class World:
    """What a rank must know about itself.

    ``detect`` cannot ask the other ranks.  Where only mpi4py knows, it gives world_size 0,
    local_rank -1, address "" or port 0."""

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this host
    local_world: int  # number of ranks on this host
    device: torch.device
    backend: str  # of torch.distributed; a lone process, which initialises none, has it too
    launcher: str  # "torchrun" | "srun" | "mpirun" | "plain" | "ringx"
    address: str  # of the host of rank 0; "" for a lone process
    port: int  # on that host; 0 for a lone process

    @property
    def world(self) -> int:
        """`world_size`, under the name that it had before."""
        return self.world_size


def rank_label(world: World) -> str:
    """How error messages name a rank: "rank 1 of 4 (srun)"."""
    return f"rank {world.rank} of {world.world_size} ({world.launcher})"


def resolve_device_type(device: str) -> str:
    """ "cpu" or "cuda" for a device option, which may also be "auto": cuda where there is a GPU.

    Raises:
        ValueError: the device is unknown, or there is no GPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={device!r} must be 'auto', 'cpu' or 'cuda' "
            "(each rank takes the GPU of its local rank)."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device='cuda', but torch sees no GPU here; "
            "check the driver, CUDA_VISIBLE_DEVICES, or take 'cpu'."
        )
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def bind_device(device: str, local_rank: int, local_world: int, launcher: str) -> torch.device:
    """The CPU, or a GPU: number `local_rank` where all are visible, the only one where the
    scheduler shows each rank its own.

    Raises:
        ValueError: there are fewer GPUs than ranks on this host, or the device cannot be had."""
    if resolve_device_type(device) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_world > count and (count > 1 or launcher == "ringx"):
        plural = "s" if count > 1 else ""
        raise ValueError(
            f"{local_world} ranks on this host would share {count} GPU{plural}: "
            f"start at most {count} per host, let the scheduler show each rank one GPU "
            "(srun --gpus-per-task=1), or take device='cpu'."
        )
    return torch.device("cuda", max(local_rank, 0) % count)


def world_of(launcher_info: LauncherInfo, device: str) -> World:
    """The World of the rank that the launcher's variables describe, with its device."""
    bound_device = bind_device(
        device, launcher_info.local_rank, launcher_info.local_world, launcher_info.launcher
    )
    return World(
        rank=launcher_info.rank,
        world_size=launcher_info.world_size,
        local_rank=launcher_info.local_rank,
        local_world=launcher_info.local_world,
        device=bound_device,
        backend="cpu:gloo,cuda:nccl" if bound_device.type == "cuda" else "gloo",
        launcher=launcher_info.launcher,
        address=launcher_info.address,
        port=launcher_info.port,
    )
