"""Do all ranks make the same call?  One small all-gather on the CPU before anything large is sent.

It runs on every checked call: a remembered answer would itself hang when one rank remembers and
another does not.  Where the group cannot move CPU tensors (NCCL alone) a gloo group of the same
ranks carries it, so that the GPU is never waited for.
"""

import json

import torch

from .comm import Disagreement, Group, Pending, cpu_group
from .comm.torch_transport import all_gather_single

MESSAGE_BYTES = 1024  # that each rank sends


def check_consistency(group: Group, signature: dict[str, object], error: Exception | None) -> None:
    """Raises on every rank if some rank has an `error` (its own as it is) or another `signature`;
    returns otherwise.

    Raises:
        Disagreement: names the rank, and what differs."""
    has_peers = group.world_size > 1
    if has_peers and group.pg is None and error is None:
        error = ValueError(
            "check=True compares the call with the other ranks through torch.distributed, "
            "but these ranks have no process group; pass check=False."
        )
    if has_peers and group.pg is not None:
        local = _encode(signature, error)
        received = _gather(local, group)
        if error is None and not bool((received == local).all()):
            _raise_disagreement(group, [bytes(row.tolist()) for row in received])
    if error is not None:
        raise error


def _encode(signature: dict[str, object], error: Exception | None) -> torch.Tensor:
    """[MESSAGE_BYTES] uint8: the signature, or the error in its place."""
    content = signature
    if error is not None:
        content = {"error": f"{type(error).__name__}: {error}"[: MESSAGE_BYTES - 64]}
    text = json.dumps(content, ensure_ascii=True).encode()
    padded = text[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8)


def _gather(local: torch.Tensor, group: Group) -> torch.Tensor:
    """[N, MESSAGE_BYTES]"""
    out = local.new_empty((group.world_size, MESSAGE_BYTES))
    pg = cpu_group(group)
    return Pending(
        group,
        "comparing the call with the other ranks (check=True)",
        lambda: all_gather_single(out.view(-1), local, group=pg, async_op=True),
        out,
    ).wait()


def _raise_disagreement(group: Group, messages: list[bytes]) -> None:
    signatures = []
    for rank, message in enumerate(messages):
        signature = _decode(message)
        if "error" in signature:
            raise Disagreement(
                f"rank {rank} of the group (global rank {group.global_ranks[rank]}) "
                f"refused this call: {signature['error']}"
            )
        signatures.append(signature)
    for what, local_value in signatures[group.rank].items():
        for rank, signature in enumerate(signatures):
            if signature.get(what) != local_value:
                raise Disagreement(
                    f"ranks disagree on {what}: rank {group.rank} has {local_value!r}, "
                    f"rank {rank} has {signature.get(what)!r}; "
                    "every rank of the group must make the same call."
                )


def _decode(message: bytes) -> dict[str, object]:
    try:
        return json.loads(message)
    except ValueError:  # an error that was cut at MESSAGE_BYTES
        return {"error": message.decode(errors="replace").strip()}
