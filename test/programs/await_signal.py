"""Waits for SIGUSR1 and ends with status 75; in a job that was restarted, ends at once.

srun python test/programs/await_signal.py
"""

import os
import signal
import socket
import sys
import time


def on_signal(*_):
    print("received", socket.gethostname(), flush=True)
    sys.exit(75)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, on_signal)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    print("up", socket.gethostname(), restarts, flush=True)
    for _ in range(100 if restarts == "0" else 0):
        time.sleep(1)
