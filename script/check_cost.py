"""What comparing the call with those of the other ranks (check=True) costs, as a share of one step.

python script/check_cost.py --nproc 2,4,8 --seqlen 8192        # a few minutes on 2 cores

A step is one forward and backward in bf16, causal, zigzag, with 8 heads of size 64.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.distributed as dist

import ringx
from ringx.checks import integers

HEADS = 8
HEAD_DIM = 64
REPETITIONS = 31  # of the small calls that the cost of a comparison is taken from


def measure(world: ringx.launch.World, seqlen: int) -> tuple[float, float]:
    """Seconds of one comparison, and of one step without it, on this rank."""
    local_tokens = seqlen // world.world_size
    generator = torch.Generator().manual_seed(world.rank)
    tensors = []
    for _ in range(4):
        tensor = torch.randn((1, local_tokens, HEADS, HEAD_DIM), generator=generator)
        tensors.append(tensor.to(world.device, torch.bfloat16).requires_grad_())
    q, k, v, dout = tensors

    def time_small_call(check: bool) -> float:
        """Of two tokens, next to no attention."""
        dist.barrier()
        start = time.perf_counter()
        ringx.attention(q[:, :2], k[:, :2], v[:, :2], causal=True, check=check)
        return time.perf_counter() - start

    def time_step() -> float:
        dist.barrier()
        start = time.perf_counter()
        out = ringx.attention(q, k, v, causal=True, check=False)
        torch.autograd.grad(out, (q, k, v), dout)
        return time.perf_counter() - start

    time_small_call(check=True)  # warms up
    with_check = [time_small_call(check=True) for _ in range(REPETITIONS)]
    without_check = [time_small_call(check=False) for _ in range(REPETITIONS)]
    check_seconds = statistics.median(with_check) - statistics.median(without_check)
    step_seconds = min(time_step(), time_step())
    return check_seconds, step_seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=integers, default=[2, 4, 8], metavar="N,...")
    parser.add_argument("--seqlen", type=int, default=8192, help="global tokens, a multiple of 2N")
    args = parser.parse_args()
    print(f"{'N':>3}{'check ms':>10}{'step ms':>10}{'share':>9}   (the slowest rank)")
    for world_size in args.nproc:
        ranks = ringx.launch.run(measure, world_size, args.seqlen)
        check = max(check_seconds for check_seconds, _ in ranks)
        step = max(step_seconds for _, step_seconds in ranks)
        print(f"{world_size:3}{1e3 * check:10.2f}{1e3 * step:10.1f}{check / step:9.2%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
