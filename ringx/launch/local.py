"""Ranks as processes of this machine, for a laptop or one node.

A rank ends when its parent closes its pipe or dies, however that happens.  The first error ends all
the others.  The parent raises the error that explains the rest, not those of ranks that lost a
peer.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..comm import Disagreement, PeerError
from .environ import LauncherInfo
from .process_group import join
from .world import bind_device

GRACE = 2.0  # seconds to wait, after a rank reported that it lost a peer, for the peer's own report

# errors of torch's own collectives, and of ranks that did not find each other
LOST_PEER_MESSAGES = ("gloo/transport", "closed by peer", "not all of")


@dataclass(frozen=True)
class _Task:
    """What a started rank does."""

    launcher_info: LauncherInfo
    call: bytes  # (function, arguments), pickled
    device: str
    timeout: float  # seconds
    threads: int  # of torch
    environment: dict[str, str]


class _Rank(NamedTuple):
    """A started rank, as its parent sees it."""

    process: Any  # a multiprocessing process of one of its contexts
    connection: Connection


class _Report(NamedTuple):
    """The end of a rank."""

    kind: str  # "result" | "raised" | "lost a peer" | "died"
    content: Any  # the pickled result, or text


def start(
    fn: Callable[..., Any],
    nproc: int,
    args: tuple,
    *,
    device: str,
    timeout: float,
    threads: int,
) -> list[Any]:
    """[fn(world, *args) of each of `nproc` ranks]; see ``launch.run``."""
    bind_device(device, 0, nproc, "ringx")  # refuse here what every rank would refuse
    # pickled by value: torch's own way would share the tensors' memory with the ranks
    call = pickle.dumps((fn, args))
    # forkserver: a clean process that has imported torch once (seconds) and forks each rank from
    # itself (milliseconds)
    has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    method = "forkserver" if has_forkserver else "spawn"
    context: Any = multiprocessing.get_context(method)
    if has_forkserver:
        context.set_forkserver_preload(["torch"])
    # served by this process, so that no other can take the port between its choice and its use
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    try:
        for rank in range(nproc):
            launcher_info = LauncherInfo(
                launcher="ringx",
                rank=rank,
                world_size=nproc,
                local_rank=rank,
                local_world=nproc,
                address="127.0.0.1",
                port=store.port,
            )
            task = _Task(launcher_info, call, device, timeout, threads, dict(os.environ))
            ranks.append(_start_rank(context, task, pass_stdio=has_forkserver))
        return _collect(ranks)
    finally:
        _end_all(ranks, kill=sys.exc_info()[0] is not None)


def _start_rank(context: Any, task: _Task, pass_stdio: bool) -> _Rank:
    parent_end, child_end = context.Pipe()
    stdio: list[Connection] = []
    if pass_stdio:
        # a forkserver has the stdout that it was started with, which may not be the current one
        stdio = [Connection(os.dup(descriptor), readable=False) for descriptor in (1, 2)]
    process = context.Process(
        target=_run_rank, args=(child_end, stdio, task), name=f"rank {task.launcher_info.rank}"
    )
    process.start()
    for connection in (child_end, *stdio):
        connection.close()
    return _Rank(process, parent_end)


def _end_all(ranks: Sequence[_Rank], kill: bool) -> None:
    for process, connection in ranks:
        if kill:
            process.kill()
        connection.close()  # a rank ends when it sees this
    for process, _ in ranks:
        process.join(5)
        if process.exitcode is None:
            process.kill()
            process.join(5)


# ---- the parent: what became of the ranks


def _collect(ranks: Sequence[_Rank]) -> list[Any]:
    """The results by rank, or the error that explains best why there are none."""
    reports = _receive_reports(ranks)
    failure = _explain_failure(reports, len(ranks))
    if failure is not None:
        raise RuntimeError(failure)
    return [pickle.loads(reports[rank].content) for rank in range(len(ranks))]


def _receive_reports(ranks: Sequence[_Rank]) -> dict[int, _Report]:
    """By rank, in order of arrival; not of all ranks, where the reports that came explain a failure
    or the others do not come in time."""
    reports: dict[int, _Report] = {}
    deadline = float("inf")
    while len(reports) < len(ranks) and time.monotonic() < deadline:
        pending = [rank for rank in range(len(ranks)) if rank not in reports]
        multiprocessing.connection.wait(
            [ranks[rank].connection for rank in pending], min(1.0, deadline - time.monotonic())
        )
        for rank in pending:
            report = _receive_report(ranks[rank])
            if report is None:
                continue
            reports[rank] = report
            if report.kind != "result":
                deadline = min(deadline, time.monotonic() + GRACE)
        if _is_explained(reports):
            break
    return reports


def _receive_report(rank: _Rank) -> _Report | None:
    """None while the rank is at work."""
    process, connection = rank
    if not connection.poll() and process.exitcode is None:
        return None
    try:
        if connection.poll():
            return connection.recv()
    except (EOFError, OSError):
        pass
    return _Report("died", _describe_death(process))


def _describe_death(process: Any) -> str:
    process.join(5)
    status = process.exitcode
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}."
    return (
        f"ended with status {status} before it had a result; see its output. "
        "(A script that starts ranks must be a file and do so "
        'under `if __name__ == "__main__":`.)'
    )


def _first_of_kind(reports: dict[int, _Report], kind: str) -> int | None:
    """The rank whose report of this kind arrived first."""
    for rank, report in reports.items():
        if report.kind == kind:
            return rank
    return None


def _is_explained(reports: dict[int, _Report]) -> bool:
    """Do the reports hold the cause of a failure, so that no others need be awaited?"""
    kinds = {report.kind for report in reports.values()}
    return "raised" in kinds or {"died", "lost a peer"} <= kinds


def _explain_failure(reports: dict[int, _Report], number_of_ranks: int) -> str | None:
    """None if there was no failure."""
    raised = _first_of_kind(reports, "raised")
    died = _first_of_kind(reports, "died")
    waited = _first_of_kind(reports, "lost a peer")
    if raised is not None:
        return f"rank {raised} of {number_of_ranks} raised {reports[raised].content}"
    if died is not None:
        consequence = ""
        if waited is not None:
            consequence = f" Rank {waited} then raised {reports[waited].content}"
        return f"rank {died} of {number_of_ranks} {reports[died].content}{consequence}"
    if waited is not None:
        silent = [rank for rank in range(number_of_ranks) if rank not in reports]
        return (
            f"rank {waited} of {number_of_ranks} waited for its peers in vain; "
            f"{_describe_silent(silent)} still at work. It raised {reports[waited].content}"
        )
    return None


def _describe_silent(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none is"
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    return f"ranks {ranks} are"


# ---- the child: one rank


def _run_rank(connection: Connection, stdio: Sequence[Connection], task: _Task) -> None:
    """The life of a started rank: ends when the parent closes its end of the connection or dies."""
    # Ctrl-C reaches the parent, which ends its ranks: one traceback, not N
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch = threading.Thread(target=_exit_with_parent, args=(connection,), daemon=True)
    watch.start()
    for descriptor, stream in enumerate(stdio, 1):
        os.dup2(stream.fileno(), descriptor)
    for output in (sys.stdout, sys.stderr):
        # what is printed survives a kill
        output.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(task.environment)
    connection.send(_report_of(task))
    watch.join()


def _report_of(task: _Task) -> _Report:
    """Joins the other ranks and makes the call."""
    try:
        torch.set_num_threads(task.threads)
        fn, args = pickle.loads(task.call)
        world = join(task.launcher_info, task.device, task.timeout, serve=False)
        return _Report("result", pickle.dumps(fn(world, *args)))
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        headline = "".join(traceback.format_exception_only(type(error), error)).strip()
        kind = "lost a peer" if _is_lost_peer(error) else "raised"
        return _Report(kind, f"{headline}\n\n{traceback.format_exc()}")


def _exit_with_parent(connection: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(0)  # the result is delivered, or nobody wants it


def _is_lost_peer(error: BaseException | None) -> bool:
    """Was this error, or one that it came from, caused by another rank's?"""
    while error is not None:
        if isinstance(error, (PeerError, Disagreement, dist.DistError)):
            return True
        if any(message in str(error) for message in LOST_PEER_MESSAGES):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
