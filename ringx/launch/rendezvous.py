"""The rendezvous: a key-value store that all ranks have reached, before torch connects them.

Rank 0, or the launcher, serves the store at the world's address and port.  Every rank writes its
GPU and its network address there.  Rank 0 waits for all of them and writes the complete list, for
which the others wait: N keys to watch, not N * N.  From the list each rank sees whether two ranks
have the same GPU, and which network interface leads to the others.
"""

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from .world import World, rank_label

MAX_NAMED_RANKS = 16  # missing ranks that an error message names
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface

# init and shutdown may alternate: each rendezvous has its own keys in the store
_rendezvous_numbers = itertools.count()


class _RankEntry(NamedTuple):
    """What a rank writes into the store for the others."""

    gpu: str  # UUID; "" without a GPU
    address: str  # IPv4, from which it reaches rank 0; "" where that is not known


def open_store(world: World, job: str, timeout: float, serve: bool) -> dist.Store:
    """The store that all ranks have reached.

    Sets GLOO_SOCKET_IFNAME, unless it is set, to the interface that leads to the other ranks.

    Args:
        job: tells apart jobs that use the same address and port.
        timeout: seconds.
        serve: this rank serves the store.

    Raises:
        RuntimeError: not all ranks came within the timeout.
        ValueError: this rank's GPU is another rank's too."""
    deadline = time.monotonic() + timeout
    tcp_store = _connect(world, timeout, deadline, serve)
    store = dist.PrefixStore(f"ringx/{job}/{next(_rendezvous_numbers)}", tcp_store)
    local_entry = _RankEntry(_gpu_uuid(world), _address_towards(world.address))
    entries = _exchange_entries(world, store, local_entry, timeout, deadline)
    _refuse_shared_gpu(local_entry.gpu, entries)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # else gloo takes what the host's name resolves to: often a loopback address
        interface = _find_interface(world, [entry.address for entry in entries])
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return store


# ---- the store


def _connect(world: World, timeout: float, deadline: float, serve: bool) -> dist.TCPStore:
    try:
        if not serve:
            _await_server(world.address, world.port, deadline)
        store = dist.TCPStore(
            world.address,
            world.port,
            world.world_size,
            serve,
            timedelta(seconds=max(deadline - time.monotonic(), 1)),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise RuntimeError(
            f"{rank_label(world)} could not meet the others at {world.address}:{world.port} "
            f"within {timeout:g} s: {first_line}\n"
            "Is that the host of rank 0 and reachable from here, is the port free, "
            f"was rank 0 started? {_remedy(world)}"
        ) from error
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _remedy(world: World) -> str:
    return (
        f"MASTER_ADDR and MASTER_PORT, set alike for all {world.world_size} ranks, "
        "choose another place."
    )


def _await_server(address: str, port: int, deadline: float) -> None:
    """Waits until a process listens there.

    A TCPStore waits too, but up to twice its timeout, and its error is a page of C++ frames."""
    pause = 0.1
    while True:
        try:
            time_left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((address, port), timeout=time_left).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(max(min(pause, deadline - time.monotonic()), 0))
        pause = min(2 * pause, 2.0)


def _exchange_entries(
    world: World, store: dist.Store, local_entry: _RankEntry, timeout: float, deadline: float
) -> list[_RankEntry]:
    """The entries of all ranks, by rank; a RuntimeError if they do not all come."""
    keys = [f"here/{rank}" for rank in range(world.world_size)]
    received = ""
    try:
        store.set(keys[world.rank], "\t".join(local_entry))
        awaited_keys = keys if world.rank == 0 else ["all"]
        store.wait(awaited_keys, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        if world.rank == 0:
            store.set("all", "\n".join(value.decode() for value in store.multi_get(keys)))
        received = store.get("all").decode()
    except RuntimeError:
        received = _report_missing(world, store, keys)
    if "\t" not in received:  # no list of entries, but an explanation, or nothing
        explanation = received or "Rank 0 has ended."
        raise RuntimeError(
            f"{rank_label(world)}: not all of {world.world_size} ranks came to "
            f"{world.address}:{world.port} within {timeout:g} s. {explanation} "
            f"Look for an earlier error in their output; {_remedy(world)}"
        )
    return [_RankEntry(*line.split("\t")) for line in received.split("\n")]


def _report_missing(world: World, store: dist.Store, keys: Sequence[str]) -> str:
    """Which ranks did not come; rank 0 tells the others.  "" if the store has ended with rank 0."""
    explanation = ""
    with contextlib.suppress(RuntimeError):
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            explanation = "The last came too late."
        else:
            names = ", ".join(missing[:MAX_NAMED_RANKS])
            if len(missing) > MAX_NAMED_RANKS:
                names += " and more"
            explanation = f"Missing: rank {names}."
        if world.rank == 0:
            store.set("all", explanation)
            time.sleep(0.5)  # for the others to read it
    return explanation


# ---- what the entries tell


def _gpu_uuid(world: World) -> str:
    if world.device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(world.device), "uuid", ""))


def _refuse_shared_gpu(local_gpu: str, entries: Sequence[_RankEntry]) -> None:
    if not local_gpu:
        return
    sharing = [rank for rank, entry in enumerate(entries) if entry.gpu == local_gpu]
    if len(sharing) > 1:
        raise ValueError(
            f"ranks {sharing} all have GPU {local_gpu}; start fewer ranks per host, "
            "or have the scheduler give each its own."
        )


def _address_towards(peer: str) -> str:
    """The IPv4 address of this host from which `peer` is reached; "" if there is none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # a datagram socket sends nothing here
        return probe.getsockname()[0]
    return ""


def _find_interface(world: World, addresses: Sequence[str]) -> str:
    """The network interface that leads to the other ranks; "" where that cannot be told."""
    local_address = _address_towards_others(world, addresses)
    for name, address in _interface_addresses():
        both_loopback = _is_loopback(address) and _is_loopback(local_address)
        if address == local_address or both_loopback:
            return name
    return ""


def _address_towards_others(world: World, addresses: Sequence[str]) -> str:
    """The address of this host from which the other ranks are reached; "" if it is not known.

    addresses: of all ranks, those from which they reach rank 0."""
    local_address = addresses[world.rank]
    if not _is_loopback(local_address) or world.local_world >= world.world_size:
        return local_address
    # this is the host of rank 0, whose own name leads to itself: look towards another host
    for address in addresses:
        if address and not _is_loopback(address):
            return _address_towards(address)
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _interface_addresses() -> list[tuple[str, str]]:
    """(name, IPv4 address) of each interface of this host that has one; [] if this is not Linux."""
    interfaces: list[tuple[str, str]] = []
    with (
        contextlib.suppress(ImportError, OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
    ):
        import fcntl  # here, because Windows has none

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode())
                reply = fcntl.ioctl(probe, SIOCGIFADDR, request)
                interfaces.append((name, socket.inet_ntoa(reply[20:24])))
    return interfaces
