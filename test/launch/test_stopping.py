"""Stopping early: all ranks stop at the same place; what is done is kept, and the exit
status says to come again.

python -m pytest test/launch/test_stopping.py
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ranks
from helpers.paths import ROOT

from ringx.comm import PeerError
from ringx.launch import stopping
from ringx.measure import records

BENCH = [
    "bench",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "16",
    "--dtypes",
    "fp32",
    "--algorithms",
    "ringx3",
    "--device",
    "cpu",
]


@pytest.mark.fast
def test_one_rank_receives_a_signal_and_all_stop_at_the_same_place(monkeypatch):
    """Ranks are threads; the signal's handler is called on one of them between two meetings."""
    world = 3
    watches = [type("OneRank", (stopping.Watch,), {"stop_signal": None})() for _ in range(world)]

    def rank_main(rank):
        me = ranks.world_of(rank, world)
        for place in range(5):
            try:
                watches[rank].barrier_or_stop(me)
            except stopping.Stopped:
                return place
            if (rank, place) == (1, 2):
                type(watches[rank]).stop_signal = "SIGUSR1"
        return None

    assert ranks.run(world, rank_main) == [3, 3, 3]


@pytest.mark.fast
def test_a_rank_that_does_not_come_is_named_as_in_any_other_collective():
    def rank_main(rank):
        me = ranks.world_of(rank, 2)
        if rank == 0:
            stopping.Watch().barrier_or_stop(me)

    error = ranks.attempt(2, rank_main, timeout=1)[0]
    assert (
        isinstance(error, PeerError)
        and "the meeting of all ranks" in str(error)
        and "failed on rank 0 of 2" in str(error)
    )


SIGNALLED_PROGRAM = """
import os, signal
from ringx.launch.stopping import Watch

with Watch() as watch:
    assert watch.stop_signal is None
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
with Watch() as watch:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    print(watch.stop_signal)
os.kill(os.getpid(), signal.SIGUSR1)  # the batch script repeats it until the end
print("still here")
with Watch() as watch:
    print(watch.stop_signal)
    with watch.at_once(False):
        print("goes on")
    try:
        with watch.at_once(True):
            print("waits")
    except KeyboardInterrupt:
        print("does not wait")
"""


def test_signals_are_left_alone_outside():
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.split("\n")[:-1] == [
        "SIGUSR1",
        "still here",
        "SIGUSR1",
        "goes on",
        "does not wait",
    ], done.stderr


@pytest.mark.parametrize(
    ("nproc", "number"),
    [
        pytest.param("1", stopping.SIGNALS[0], marks=pytest.mark.slow),
        ("2", stopping.SIGNALS[1]),
    ],
)
def test_bench_keeps_what_it_has_and_says_to_come_again(tmp_path, number, nproc):
    """A real process, with and without ranks that it has started itself; told after its first size,
    before its second."""
    command = [
        sys.executable,
        "-m",
        "ringx",
        *BENCH,
        "--nproc",
        nproc,
        "--seqlens",
        "64,4096",
        "--reps",
        "20",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("*.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == stopping.AGAIN, printed
    assert (
        f"interrupted by {signal.Signals(number).name}: 1 of 2 cases" in printed
        and "Traceback" not in printed
    )
    (r,) = records.read_all(tmp_path)[0]
    assert r["case"]["seqlen"] == 64


def test_without_any_progress_it_does_not_ask_to_come_again(tmp_path):
    """Else a job whose limit is too short for one size would start itself again forever."""
    command = [
        sys.executable,
        "-m",
        "ringx",
        *BENCH,
        "--nproc",
        "1",
        "--seqlens",
        "8192",
        "--reps",
        "200",
        "--out",
        str(tmp_path),
    ]
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "_", *command]
    process = subprocess.Popen(
        ignoring, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(0.5)  # for bash to do so
    while process.poll() is None:
        os.kill(process.pid, signal.SIGUSR1)  # ignored until it listens, as in a batch job
        time.sleep(0.2)
    printed = process.communicate()[0]
    assert (
        process.returncode == 1
        and "not one size was finished" in printed
        and not list(tmp_path.glob("*.json"))
    ), printed
