"""What comparing the call with the other ranks' (check=True) costs, as a share of one forward and backward.

python script/check_cost.py --nproc 2,4,8 --seqlen 8192        # a few minutes on 2 cores
"""

import argparse
import statistics
import sys
import time

import torch
import torch.distributed as dist

import ringx
from ringx.checks import integers


def measure(world: ringx.launch.World, seqlen: int) -> tuple[float, float]:
    """(seconds of one comparison, seconds of one step without it) on this rank; bf16, H = 8, D = 64, causal, zigzag."""
    g = torch.Generator().manual_seed(world.rank)
    shape = (1, seqlen // world.world_size, 8, 64)
    q, k, v, dout = (
        torch.randn(shape, generator=g).to(world.device, torch.bfloat16).requires_grad_()
        for _ in range(4)
    )

    def step(tokens: int, check: bool) -> float:
        x = [t[:, :tokens] for t in (q, k, v)]
        dist.barrier()
        start = time.perf_counter()
        out = ringx.attention(*x, causal=True, check=check)
        if tokens == shape[1]:
            torch.autograd.grad(out, (q, k, v), dout)
        return time.perf_counter() - start

    step(2, True)
    with_check, without = (
        [step(2, check) for _ in range(31)] for check in (True, False)
    )  # 2 tokens: next to no attention
    return statistics.median(with_check) - statistics.median(without), min(
        step(shape[1], False) for _ in range(2)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=integers, default=[2, 4, 8], metavar="N,...")
    parser.add_argument("--seqlen", type=int, default=8192, help="global tokens, a multiple of 2N")
    args = parser.parse_args()
    print(f"{'N':>3}{'check ms':>10}{'step ms':>10}{'share':>9}   (the slowest rank)")
    for n in args.nproc:
        ranks = ringx.launch.run(measure, n, args.seqlen)
        check, step = (max(r[i] for r in ranks) for i in (0, 1))
        print(f"{n:3}{1e3 * check:10.2f}{1e3 * step:10.1f}{check / step:9.2%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
