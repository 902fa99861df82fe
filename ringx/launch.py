"""One way to learn rank, world and address: torchrun, srun, mpirun or a plain process."""
