"""Starts two ranks that write their process ids and sleep; a test then ends this process.

python test/programs/start.py FILE
"""

import sys

import ranks_do

import ringx

if __name__ == "__main__":
    ringx.launch.run(ranks_do.pids, 2, sys.argv[1])
