"""Joins whatever started it, compares attention over all ranks with full attention, says who it is.

torchrun --nproc_per_node 2 test/programs/attend.py        (or srun, mpirun, or python alone)
"""

import sys

import torch

import ringx

if __name__ == "__main__":
    if "--no-mpi4py" in sys.argv:
        sys.modules["mpi4py"] = None  # as if it were not installed
    world = ringx.launch.init(timeout=30)
    assert ringx.launch.init() is world
    torch.manual_seed(0)
    whole = [torch.randn(1, 12, 2, 8, dtype=torch.float64) for _ in range(3)]
    out = ringx.attention(
        *(ringx.shard(x, layout="contiguous") for x in whole), causal=True, layout="contiguous"
    )
    q, k, v = (x.transpose(1, 2) for x in whole)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    error = float((ringx.unshard(out, layout="contiguous") - want).abs().max())
    assert error < 1e-12, error
    if "--twice" in sys.argv:  # leaving and joining again
        ringx.launch.shutdown()
        assert not torch.distributed.is_initialized()
        assert ringx.launch.init() == world
        assert ringx.launch.run(lambda w: w.rank, None) == [world.rank]
    sys.stdout.write(  # in one piece, so that lines of several ranks do not mix
        f"ok {world.launcher} {world.rank}/{world.world_size} "
        f"{world.local_rank}/{world.local_world} {world.address} {world.port} {world.backend} "
        f"threads {torch.get_num_threads()}\n"
    )
    sys.stdout.flush()
    if "--with-mpi" in sys.argv:
        from mpi4py import MPI

        assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) == (world.rank, world.world_size)
        sys.stdout.write(f"MPI agrees: {MPI.Get_library_version().splitlines()[0][:40]}\n")
    if "--raise" in sys.argv and world.rank == 1:
        raise ZeroDivisionError("on rank 1, with a collective under way")
    if "--raise" in sys.argv:
        ringx.attention(*(ringx.shard(x, layout="contiguous") for x in whole), layout="contiguous")
    if "--leave" not in sys.argv:  # then atexit does it
        ringx.launch.shutdown()
