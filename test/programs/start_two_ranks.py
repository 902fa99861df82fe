"""Starts two ranks that write their process ids and sleep; a test then ends this process.

python test/programs/start_two_ranks.py FILE
"""

import sys

import rank_functions

import ringx

if __name__ == "__main__":
    ringx.launch.run(rank_functions.write_pid, 2, sys.argv[1])
