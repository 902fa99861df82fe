"""Measures collectives, then every algorithm, in one process per rank: importing torch takes longer
than either.

srun -N4 --ntasks-per-node=1 python test/slurm/wire.py FOLDER
"""

import sys

import ringx
from ringx.command import cli

if __name__ == "__main__":
    ringx.launch.init(timeout=60)
    out = ("--out", sys.argv[1])
    names = "broadcast,reduce,all_reduce,all_gather,all_to_all,ring"
    sizes = (
        "--min-bytes",
        "256K",
        "--max-bytes",
        "1M",
        "--factor",
        "2",
        "--reps",
        "3",
        "--warmup",
        "1",
        "--seconds",
        "20",
    )
    status = cli.main(["bench-comm", "--collectives", names, *sizes, *out])
    case = (
        "--seqlens",
        "1024",
        "--dtypes",
        "fp32",
        "--heads",
        "8",
        "--kv-heads",
        "8",
        "--no-baseline",
        "--reps",
        "3",
    )
    sys.exit(status or cli.main(["bench", *case, *out]))
