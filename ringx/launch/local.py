"""Ranks as processes of this machine, for a laptop or one node: starts them, collects what they say, ends them all.

A rank ends when its parent closes its pipe or dies, however that happens.  The first error ends all the others: the parent
raises the one that explains the rest, not the echoes of ranks that lost a peer.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from ..comm import Disagreement, PeerError
from .environ import LauncherInfo
from .process_group import join
from .world import bind_device

GRACE = 2.0  # seconds to wait, after a rank said that a peer died, for the peer's own story


def start(
    fn: Callable[..., Any], nproc: int, args: tuple, device: str, timeout: float, threads: int
) -> list[Any]:
    """[fn(world, *args) of each of `nproc` ranks]; see ``launch.run``."""
    bind_device(device, 0, nproc, "ringx")  # refuse here what every rank would
    call = pickle.dumps(
        (fn, args)
    )  # by value: torch's own way would share the tensors' memory with the ranks
    # forkserver: a clean process that has imported torch once (seconds) and forks each rank from itself (milliseconds)
    fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(["torch"])
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # kept here: no race for a port
    ranks: list[tuple[Any, Connection]] = []
    try:
        for rank in range(nproc):
            ours, theirs = context.Pipe()
            # a forkserver has the stdout that it was started with, not this call's: hand over ours
            stdio = [Connection(os.dup(fd), readable=False) for fd in (1, 2)] if fork else []
            facts = LauncherInfo("ringx", rank, nproc, rank, nproc, "127.0.0.1", store.port)
            rest = (theirs, stdio, facts, call, device, timeout, threads, dict(os.environ))
            process = context.Process(target=_rank, args=rest, name=f"rank {rank}")
            process.start()
            ranks.append((process, ours))
            for end in (theirs, *stdio):
                end.close()
        return _collect(ranks)
    finally:
        for process, ours in ranks:
            if sys.exc_info()[0] is not None:
                process.kill()
            ours.close()  # a rank ends when it sees this
        for process, _ in ranks:
            process.join(5)
            if process.exitcode is None:
                process.kill()
                process.join(5)


def _collect(ranks: Sequence[tuple[Any, Connection]]) -> list[Any]:
    """The results by rank, or the error that explains best why there are none."""
    told: dict[
        int, tuple[str, Any]
    ] = {}  # rank -> (result | raised | peer | died, what it sent), in order of arrival

    def first(kind: str) -> int | None:
        return next((r for r, (k, _) in told.items() if k == kind), None)

    end = float("inf")
    while len(told) < len(ranks) and time.monotonic() < end:
        multiprocessing.connection.wait(
            [c for r, (_, c) in enumerate(ranks) if r not in told], min(1.0, end - time.monotonic())
        )
        for r, (process, conn) in enumerate(ranks):
            if r in told or not (conn.poll() or process.exitcode is not None):
                continue
            try:
                told[r] = conn.recv() if conn.poll() else ("died", _how_died(process))
            except (EOFError, OSError):
                told[r] = ("died", _how_died(process))
            if told[r][0] != "result":
                end = min(end, time.monotonic() + GRACE)
        if first("raised") is not None or (first("died") is not None and first("peer") is not None):
            break
    raised, died, peer = first("raised"), first("died"), first("peer")
    n = len(ranks)
    if raised is not None:
        raise RuntimeError(f"rank {raised} of {n} raised {told[raised][1]}")
    if died is not None:
        then = f" Rank {peer} then raised {told[peer][1]}" if peer is not None else ""
        raise RuntimeError(f"rank {died} of {n} {told[died][1]}{then}")
    if peer is not None:
        silent = [r for r in range(n) if r not in told]
        who = (
            f"rank {silent[0]} is"
            if len(silent) == 1
            else f"ranks {silent} are"
            if silent
            else "none is"
        )
        raise RuntimeError(
            f"rank {peer} of {n} waited for its peers in vain; {who} still at work. It raised {told[peer][1]}"
        )
    return [pickle.loads(told[r][1]) for r in range(n)]


def _how_died(process: Any) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}."
    return (
        f"ended with status {code} before it had a result; see its output. (A script that starts ranks must be a file and do so "
        'under `if __name__ == "__main__":`.)'
    )


def _rank(
    conn: Connection,
    stdio,
    facts: LauncherInfo,
    call: bytes,
    device: str,
    timeout: float,
    threads: int,
    env: dict,
) -> None:
    """The life of a started rank: ends when the parent closes `conn` or dies."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends us: one traceback, not N
    watch = threading.Thread(target=_end_with, args=(conn,), daemon=True)
    watch.start()
    for fd, end in enumerate(stdio, 1):
        os.dup2(end.fileno(), fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what is printed survives a kill
    os.environ.clear()
    os.environ.update(env)
    report: tuple[str, Any]
    try:
        torch.set_num_threads(threads)
        fn, args = pickle.loads(call)
        report = (
            "result",
            pickle.dumps(fn(join(facts, device, timeout, serve=False), *args)),
        )
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        headline = "".join(traceback.format_exception_only(type(error), error)).strip()
        report = (
            "peer" if _about_peer(error) else "raised",
            f"{headline}\n\n{traceback.format_exc()}",
        )
    conn.send(report)
    watch.join()


def _end_with(conn: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        conn.recv()
    os._exit(0)  # the result is delivered, or nobody wants it


def _about_peer(error: BaseException | None) -> bool:
    """Is this error only the echo of another rank's?"""
    signs = (
        "gloo/transport",
        "closed by peer",
        "not all of",
    )  # of torch's own collectives, and of ranks that did not meet
    while error is not None:
        if isinstance(error, (PeerError, Disagreement, dist.DistError)) or any(
            sign in str(error) for sign in signs
        ):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
