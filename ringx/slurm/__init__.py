"""Jobs on a Slurm machine: what a site is, and batch scripts for it."""
