"""Starting ranks, and joining them: rank, world size, address and device, however they were
started.

    world = ringx.launch.init()                 # on every rank; ends with ringx.launch.shutdown()
    results = ringx.launch.run(fn, 4, *args)    # starts 4 ranks here, unless a launcher already did

torchrun, srun (also without ``scontrol``), mpirun (Open MPI, MPICH, PMI, mpi4py) or a plain
process: environ.py says how each is recognised and where its ranks connect to each other.

On GPUs the backend is "cpu:gloo,cuda:nccl" (nccl is RCCL on ROCm): small messages in CPU memory
then cost no GPU synchronisation.  gloo listens on the network interface that leads to the other
ranks, unless GLOO_SOCKET_IFNAME names one.
"""

from .exchange import decide, gather
from .placement import MAX_LISTED_HOSTS, announce, describe_placement
from .process_group import detect, init, shutdown
from .start import launched, run, world_size
from .world import World, bind_device

__all__ = [
    "MAX_LISTED_HOSTS",
    "World",
    "announce",
    "bind_device",
    "decide",
    "describe_placement",
    "detect",
    "gather",
    "init",
    "launched",
    "run",
    "shutdown",
    "world_size",
]
