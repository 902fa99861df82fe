# Alps, GH200 clusters such as Clariden and Daint (CSCS): HPE Cray EX, per node 4 GH200 with 96 GB
# HBM, 4 Slingshot NICs. Revised 2026-11-21.  Untested: everything in this file; written from public
# documentation.  Unsure: the number of nodes (it differs from cluster to cluster and month to
# month), the newest uenv, and whether a container job on Alps needs other settings (it sets its
# own).
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cuda
#SITE ranks-per-node    4
#SITE memory-per-rank   95                # GiB that a GH200 of 96 GB HBM offers
#SITE account           required
#SITE limit             1024 24:00:00     # normal has no limit of its own: as many nodes as there are
#SITE srun              --cpus-per-task=72
#SBATCH --partition=normal
#SBATCH --gpus-per-node=4
#SBATCH --uenv=pytorch/v2.9.1:v2
#SBATCH --view=default
#
# This file shows every rank all 4 GPUs; ringx.launch takes that of the local rank, and 72 cores per
# rank put it beside them.  The other habit, one visible GPU per rank (srun --gpus-per-task=1),
# works with ringx.launch too, but devices are then isolated per rank: add
# --gres-flags=allow-task-sharing to srun, or NCCL cannot use NVLink inside a node. The uenv (pull
# it first: `uenv image pull pytorch/v2.9.1:v2`) brings torch, NCCL and the network plugin, and no
# modules are loaded.
#
# Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_ENV       virtual environment made inside the uenv with --system-site-packages; default:
#                   the uenv's Python

# shellcheck shell=bash disable=SC1090,SC1091
if [ -n "${RINGX_ENV:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/alps.sh (Alps): no bin/python in RINGX_ENV=$RINGX_ENV" \
            "(or its uenv is not mounted)" >&2
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi

# Which network.  Without the plugin (aws-ofi-nccl) NCCL falls back to TCP and says so only in its
# debug output: a measurement of another network.  With NCCL_NET set it stops instead ("network AWS
# Libfabric not found": the uenv's view is missing).  Do not set NCCL_NET_PLUGIN as well: with a
# uenv the plugin is then not found.
export NCCL_NET="${NCCL_NET:-AWS Libfabric}"
# a prefix; where ranks find each other
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn}"
# a name, not a prefix; gloo's data goes through it
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0}"
# Both decide the bandwidth that is measured: all four NICs for one ring, GPU memory read and
# written by the NIC.
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-1}"
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"
# Changes what is measured, so that the comparison is fair.  NCCL tunes send and recv for
# all-to-all, where every rank talks to many peers, and gives each peer on the network only a
# channel or two.  A point-to-point ring (ring attention) talks to one peer at a time: its few
# channels leave much of the NIC idle (reported for sendrecv on 32 GH200: 18 instead of 24 GB/s,
# NVIDIA/nccl issue 1272), and the ring would look slower than it is beside collectives that use all
# channels.  4 is the site's compromise: more helps send and recv further, at the collectives' cost.
# Set it in every job of a comparison or in none: ringx3's backward has an all-to-all, which is send
# and recv too.
export NCCL_NCHANNELS_PER_NET_PEER="${NCCL_NCHANNELS_PER_NET_PEER:-4}"
# Correctness: on GH200 the LL128 protocol of NCCL 2.27 and newer can deliver wrong data over this
# network (NVIDIA/nccl issue 2001), and is slow here anyway.  Without it NCCL takes LL or Simple:
# messages of middle size may be timed differently than on other machines.
export NCCL_PROTO="${NCCL_PROTO:-^LL128}"
# libfabric: against deadlocks and overflow, as the site advises.
export FI_MR_CACHE_MONITOR="${FI_MR_CACHE_MONITOR:-userfaultfd}"
export FI_CXI_DISABLE_HOST_REGISTER="${FI_CXI_DISABLE_HOST_REGISTER:-1}"
export FI_CXI_DEFAULT_CQ_SIZE="${FI_CXI_DEFAULT_CQ_SIZE:-131072}"
export FI_CXI_DEFAULT_TX_SIZE="${FI_CXI_DEFAULT_TX_SIZE:-32768}"
export FI_CXI_RX_MATCH_MODE="${FI_CXI_RX_MATCH_MODE:-software}"
# If NCCL hangs, at the price of slower small messages: FI_CXI_RDZV_GET_MIN, FI_CXI_RDZV_THRESHOLD
# and FI_CXI_RDZV_EAGER_SIZE, all 0.
# GPU-aware MPI beside NCCL can deadlock; ringx does not use it
export MPICH_GPU_SUPPORT_ENABLED="${MPICH_GPU_SUPPORT_ENABLED:-0}"

# Caches on the node (here: in its memory), not in a home folder that thousands of ranks would write
# to.  Each node compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/dev/shm/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|FI|OFI|GLOO|MASTER)_' | LC_ALL=C sort >&2 || true
