"""Blocks of all ranks, one after another."""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from .transport import Pending, Transport


def broadcast_stream(
    transport: Transport,
    local_block: torch.Tensor,
    shapes: Sequence[Sequence[int]],
    overlap: bool,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each rank's block in rank order, as (src, block); `shapes[src]` is its shape, and an empty
    one is not sent at all.

    With overlap two broadcasts are always ahead, in two buffers that take turns: this call posts
    the first two, and a block is valid until the next one is asked for, which gives its buffer to
    the one after that.  Without, one at a time.
    """
    rank = transport.group.rank
    owners = [src for src, shape in enumerate(shapes) if prod(shape)]
    ahead = min(2 if overlap else 1, len(owners))
    largest = max((prod(shapes[src]) for src in owners if src != rank), default=0)
    buffers = [local_block.new_empty(largest) for _ in range(ahead)]

    def post(i: int) -> Pending:
        src = owners[i]
        if src == rank:
            return transport.broadcast(local_block, src)
        buffer = buffers[i % ahead][: prod(shapes[src])]
        return transport.broadcast(buffer.view(*shapes[src]), src)

    posted = [post(i) for i in range(ahead)] if overlap else []

    def stream() -> Iterator[tuple[int, torch.Tensor]]:
        for i, src in enumerate(owners):
            pending = posted.pop(0) if overlap else post(i)
            yield src, pending.wait()
            if overlap and i + ahead < len(owners):
                posted.append(post(i + ahead))

    return stream()
