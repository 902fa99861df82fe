"""What tests have ranks do: functions of (world, ...) for ringx.launch.run."""

import os
import signal
import sys
import time

import torch

import ringx


def describe_rank(world, word):
    """Rank, thread count and arguments; what is printed passes through."""
    sys.stdout.write(
        f"{word} from rank {world.rank}\n"
    )  # in one piece, also where PYTHONUNBUFFERED is set
    return world, torch.get_num_threads(), word, torch.arange(world.rank + 1)


def attend(world, algorithm="ringx4", backward=False, seqlen=24):
    """One causal attention on this rank's share of a fixed problem."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 2, 8, dtype=torch.float64) for _ in range(3))
    q, k, v = (ringx.shard(x, layout="contiguous").requires_grad_(backward) for x in (q, k, v))
    out = ringx.attention(q, k, v, algorithm=algorithm, causal=False, layout="contiguous")
    if backward:
        out.sum().backward()
    return out.detach()


def raise_on(world, culprit):
    """One rank raises while the others wait for it in a collective."""
    if world.rank == culprit:
        raise KeyError(f"rank {culprit} has no such thing")
    return attend(world)


def pass_bool_on(world, culprit):
    """One rank passes what attention refuses: all ranks raise, but the culprit's own words
    count."""
    x = torch.zeros(1, 4, 2, 8)
    return ringx.attention(x.bool() if world.rank == culprit else x, x, x)


def stop_in_attention(world, culprit, direction, how):
    """One rank is killed, or sleeps, in the middle of an attention's forward or backward."""
    if world.rank == culprit:
        from ringx import comm

        stop = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "sleep": lambda: time.sleep(600),
        }[how]
        broadcast = comm.Transport.broadcast

        def broadcast_or_stop(transport, x, src):
            if comm.accounting.current_phase().direction == direction and src == culprit:
                stop()
            return broadcast(transport, x, src)

        comm.Transport.broadcast = broadcast_or_stop
    return attend(world, backward=direction == "backward")


def exit_on(world, culprit):
    """One rank ends without a word."""
    if world.rank == culprit:
        sys.stdout.flush()
        os._exit(3)
    return attend(world)


def write_pid(world, path):
    """Writes this rank's process id to a file and waits to be ended."""
    with open(f"{path}.{world.rank}", "w") as f:
        f.write(str(os.getpid()))
    time.sleep(600)


def number_of_threads(world):
    return torch.get_num_threads()


def return_lambda(world):
    return lambda: None
