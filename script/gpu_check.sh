#!/usr/bin/env bash
# Check every kernel and every algorithm's local schedule on this machine's GPU, and time them.
# Needs PyTorch >= 2.11 built for the GPU and nothing else: no installation, no network, one GPU.
# About ten minutes.
#
#   bash script/gpu_check.sh                          # -> results/gpu_check_<device>_<date>.json;
#                                                     #    exit status 1 on a miss
#   bash script/gpu_check.sh --device cpu --quick     # the same code in under a minute, anywhere
#   PYTHON=/path/to/python bash script/gpu_check.sh   # with another Python than `python3` (or that
#                                                     #    of an active environment)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
cd "$root"
exec "$python" script/gpu_check.py "$@"
