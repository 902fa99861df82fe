"""Joining the others: the store in which all ranks meet, and the network interface that leads to them."""

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from .world import World

_times = (
    itertools.count()
)  # init and shutdown may alternate: each time has its own keys in the store


def _meet(world: World, job: str, timeout: float, serve: bool) -> dist.Store:
    """The store that all ranks reached; each has said in it that it is here."""
    end = time.monotonic() + timeout
    where = f"{world.address}:{world.port}"
    choose = f"MASTER_ADDR and MASTER_PORT, set alike for all {world.world_size} ranks, choose another place."
    try:
        if not serve:
            _await_server(world.address, world.port, end)
        left = timedelta(seconds=max(end - time.monotonic(), 1))
        tcp = dist.TCPStore(
            world.address,
            world.port,
            world.world_size,
            serve,
            left,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"{_who(world)} could not meet the others at {where} within {timeout:g} s: {str(error).splitlines()[0]}\n"
            f"Is that the host of rank 0 and reachable from here, is the port free, was rank 0 started? {choose}"
        ) from error
    tcp.set_timeout(timedelta(seconds=timeout))
    store = dist.PrefixStore(f"ringx/{job}/{next(_times)}", tcp)
    gpu = (
        str(getattr(torch.cuda.get_device_properties(world.device), "uuid", ""))
        if world.device.type == "cuda"
        else ""
    )
    keys = [f"here/{r}" for r in range(world.world_size)]
    found = ""
    try:  # rank 0 waits for all and tells the rest: N keys to watch, not N * N
        store.set(keys[world.rank], f"{gpu}\t{_my_address(world.address)}")
        store.wait(
            keys if world.rank == 0 else ["all"],
            timedelta(seconds=max(end - time.monotonic(), 0.001)),
        )
        if world.rank == 0:
            store.set("all", "\n".join(value.decode() for value in store.multi_get(keys)))
        found = store.get("all").decode()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # rank 0, and the store with it, may have ended
            missing = [r for r, key in enumerate(keys) if not store.check([key])]
            names = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
            found = f"Missing: rank {names}." if missing else "The last came too late."
            if world.rank == 0:
                store.set("all", found)
                time.sleep(0.5)  # for the others to read it
    if "\t" not in found:
        raise RuntimeError(
            f"{_who(world)}: not all of {world.world_size} ranks came to {where} within {timeout:g} s. {found or 'Rank 0 has ended.'} "
            f"Look for an earlier error in their output; {choose}"
        )
    said = [line.split("\t") for line in found.split("\n")]
    twins = [r for r, (other, _) in enumerate(said) if gpu and other == gpu]
    if len(twins) > 1:
        raise ValueError(
            f"ranks {twins} all have GPU {gpu}; start fewer ranks per host, or have the scheduler give each its own."
        )
    if "GLOO_SOCKET_IFNAME" not in os.environ and (
        name := _interface(world, [address for _, address in said])
    ):
        os.environ["GLOO_SOCKET_IFNAME"] = (
            name  # else gloo takes what the host's name resolves to: often a loopback address
        )
    return store


def _who(world: World) -> str:
    return f"rank {world.rank} of {world.world_size} ({world.launcher})"


def _await_server(address: str, port: int, end: float) -> None:
    """Until somebody listens there.  (A TCPStore waits too, but up to twice its timeout and with a page of C++ frames.)"""
    pause = 0.1
    while True:
        try:
            socket.create_connection(
                (address, port), timeout=max(end - time.monotonic(), 0.1)
            ).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(max(min(pause, end - time.monotonic()), 0))
        pause = min(2 * pause, 2.0)


def _my_address(peer: str) -> str:
    """The IPv4 address of this host from which `peer` is reached; "" if there is none.  Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((peer, 9))
        return s.getsockname()[0]
    return ""


def _interface(world: World, addresses: Sequence[str]) -> str:
    """The name of the network interface that leads to the other ranks; "" where that cannot be told (not on Linux)."""
    mine = addresses[world.rank]
    if (
        mine.startswith("127.") and world.local_world < world.world_size
    ):  # rank 0's host, whose own name leads to itself
        mine = next((_my_address(a) for a in addresses if a and not a.startswith("127.")), "")
    with (
        contextlib.suppress(ImportError, OSError),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s,
    ):
        import fcntl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                row = fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                address = socket.inet_ntoa(row[20:24])
                if address == mine or (address.startswith("127.") and mine.startswith("127.")):
                    return name
    return ""
