# Any Slurm cluster with GPUs: 4 per node unless you edit this file.  Copy it to make a file for
# your site.  Revised 2026-11-21. Untested: everything in this file.  Assumed: Slurm knows the GPUs
# (GRES gpu), and torch finds its CUDA or ROCm without modules.
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md).  No
# limit and no memory: add what `scontrol show partition` and `ringx info` say.
#SITE device            cuda              # CUDA and ROCm: torch calls both cuda
#SITE ranks-per-node    4                 # one per GPU: change it together with --gpus-per-node
#SITE account           optional
#SBATCH --gpus-per-node=4
#
# This file shows every rank all GPUs of its node; ringx.launch takes that of the local rank.  The
# other habit, one visible GPU per rank ("#SITE srun --gpus-per-task=1", perhaps with
# --gpu-bind=closest), works with ringx.launch too.  Where the site isolates devices, that one keeps
# NCCL and RCCL from reaching the neighbours' GPUs directly, and intra-node traffic takes the way
# through host memory: look for P2P, not SHM, in the output of NCCL_DEBUG=INFO, and add
# --gres-flags=allow-task-sharing to srun if it is SHM.
#
# Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_ENV                                  virtual environment or conda prefix with torch
#   RINGX_MODULES                              modules to load, separated by spaces; default none
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME     network interfaces; without them NCCL and RCCL
#                                              choose, and gloo listens on the one that
#                                              leads to the other ranks
# Not set, because the right value is the site's: anything that chooses or tunes the network.  Run
# with NCCL_DEBUG=INFO once and check which one was taken (NET/IB, a plugin, or NET/Socket: plain
# TCP, often the wrong one) before you believe a number.

# shellcheck shell=bash
for _ringx_module in ${RINGX_MODULES:-}; do
    module load "$_ringx_module" || {
        echo "ringx: env/generic-gpu.sh (any cluster, GPU): cannot load module $_ringx_module" \
            "of RINGX_MODULES" >&2
        unset _ringx_module
        return 1
    }
done
unset _ringx_module
if [ -n "${RINGX_ENV:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/generic-gpu.sh (any cluster, GPU):" \
            "no bin/python in RINGX_ENV=$RINGX_ENV" >&2
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi

# Caches on the node, not in a home folder that thousands of ranks would write to.  Each node
# compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/tmp/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|RCCL|UCX|FI|GLOO|MASTER)_' | LC_ALL=C sort >&2 || true
