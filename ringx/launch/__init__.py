"""Starting ranks: one way to learn rank, world and address, whoever started this process, and a way to start ranks right here.

    world = ringx.launch.init()                 # on every rank, whoever started it; ends with ringx.launch.shutdown()
    results = ringx.launch.run(fn, 4, *args)    # starts 4 ranks on this machine, unless a launcher already did

torchrun, srun (also without ``scontrol``), mpirun (Open MPI, MPICH, PMI, mpi4py) or a plain process: environ.py says how each is
recognised and where its ranks meet.

On GPUs the backend is "cpu:gloo,cuda:nccl" (nccl is RCCL on ROCm): small messages in CPU memory then cost no GPU
synchronisation.  gloo listens on the network interface that leads to the other ranks, unless GLOO_SOCKET_IFNAME names one.
"""

from .exchange import decide, gather
from .placement import ANNOUNCED, announce, described
from .process_group import detect, init, shutdown
from .start import launched, run, world_size
from .world import World, bind_device

__all__ = [
    "ANNOUNCED",
    "World",
    "announce",
    "bind_device",
    "decide",
    "described",
    "detect",
    "gather",
    "init",
    "launched",
    "run",
    "shutdown",
    "world_size",
]
