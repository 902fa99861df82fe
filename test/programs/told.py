"""Waits for SIGUSR1 and ends with status 75; in a job that was restarted, ends at once.

srun python test/programs/told.py
"""

import os
import signal
import socket
import sys
import time


def told(*_):
    print("told", socket.gethostname(), flush=True)
    sys.exit(75)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, told)
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    print("up", socket.gethostname(), restarts, flush=True)
    for _ in range(100 if restarts == "0" else 0):
        time.sleep(1)
