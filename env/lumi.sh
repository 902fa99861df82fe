# LUMI-G (CSC): HPE Cray EX, per node 4 AMD MI250X = 8 GCDs of 64 GiB, 4 Slingshot NICs.
# Revised 2026-11-21. Untested: everything in this file; written from public documentation.  Unsure:
# whether the image named below exists when you read this, whether its libfabric and RCCL plugin are
# taken without further bindings, and whether --network=disable_rdzv_get is allowed here.
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cuda              # torch calls ROCm devices cuda
#SITE ranks-per-node    8                 # one rank per GCD
#SITE memory-per-rank   64                # GiB of a GCD
#SITE account           required          # project_...
#SITE max-array         200               # jobs of a user in standard-g; each array task is one
#SITE limit             1024 48:00:00     # standard-g; larger jobs: partition bench, on request
#SITE srun              --cpu-bind=mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,0xfe00000000,0xfe0000000000
#SBATCH --partition=standard-g
#SBATCH --gpus-per-node=8
#SBATCH --mem=480G
#
# The CPU has 8 groups of 8 cores.  The first core of each is the system's, so a rank gets 7 (8 x 7
# of 64), and the masks give rank i the group next to GCD i: cores 49-55, 57-63, 17-23, 25-31, 1-7,
# 9-15, 33-39, 41-47.  They hold for whole nodes (standard-g) with the ranks in order.  This file
# shows every rank all 8 GCDs; ringx.launch takes that of the local rank, which is what the masks
# expect.  The other habit, one visible GPU per rank (srun --gpus-per-task=1), works with
# ringx.launch too, but not with these masks, and RCCL then needs --gres-flags=allow-task-sharing to
# reach the neighbours' GCDs inside a node (without it: slower, through host memory, or an error).
#
# Python runs in a container (the site advises against environments of many small files on its
# disks).  Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_CONTAINER          image with torch >= 2.8 for ROCm: a LUMI AI Factory image (default), or
#                            your own, for example from
#                            `cotainr build ringx.sif --base-image=... --conda-env=...`
#   RINGX_CONTAINER_OPTIONS  more options for `singularity exec`, for example --bind of a folder
#   RINGX_ENV                virtual environment that the image's Python made with
#                            --system-site-packages

# shellcheck shell=bash disable=SC1090,SC1091
# the last binds /scratch, /project, ... into the container
for _ringx_module in Local-LAIF lumi-aif-singularity-bindings; do
    module load "$_ringx_module" || {
        echo "ringx: env/lumi.sh (LUMI): cannot load module $_ringx_module;" \
            "see 'module spider', then edit the file" >&2
        unset _ringx_module
        return 1
    }
done
unset _ringx_module
# "latest" is a link: resolved here, so that all ranks, and the log, name the same image.
_ringx_image=/appl/local/laifs/containers/lumi-multitorch-latest.sif
_ringx_image=$(readlink -f -- "${RINGX_CONTAINER:-$_ringx_image}") || _ringx_image=
if [ ! -r "${_ringx_image:-/nonexistent}" ]; then
    echo "ringx: env/lumi.sh (LUMI):" \
        "cannot read the image ${RINGX_CONTAINER:-lumi-multitorch-latest.sif};" \
        "set RINGX_CONTAINER" >&2
    unset _ringx_image
    return 1
fi
export RINGX_CONTAINER="$_ringx_image"
unset _ringx_image
[ -z "${RINGX_ENV:-}" ] ||
    export RINGX_CONTAINER_PYTHON="${RINGX_CONTAINER_PYTHON:-$RINGX_ENV/bin/python}"
export PYTHON="${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/container-python}"

# Which network.  Without the plugin (in the image, or bound into it) RCCL falls back to TCP and
# says so only in its debug output: a measurement of another network.  With NCCL_NET set it stops
# instead.  HPE advises against setting it on one node.
[ "${SLURM_JOB_NUM_NODES:-1}" -le 1 ] || export NCCL_NET="${NCCL_NET:-AWS Libfabric}"
# where ranks find each other; data goes through libfabric
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn0,hsn1,hsn2,hsn3}"
# gloo's data does go through these
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0,hsn1,hsn2,hsn3}"
# Both decide the bandwidth that is measured: all four NICs for one ring, GPU memory read and
# written by the NIC.
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-1}"
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"
# Not set: NCCL_NCHANNELS_PER_NET_PEER.  Before comparing with point-to-point rings, read
# env/alps.sh and try 4, for all that is compared.

# Needed for the NIC's access to GPU memory
export HSA_FORCE_FINE_GRAIN_PCIE="${HSA_FORCE_FINE_GRAIN_PCIE:-1}"
# libfabric: against deadlocks and overflow, not for speed.  Unlike env/frontier.sh,
# FI_CXI_RDZV_PROTO stays at its default, because alt_read needs --network=disable_rdzv_get and this
# file is unsure of that: numbers of the two machines differ in this setting.
export FI_MR_CACHE_MONITOR="${FI_MR_CACHE_MONITOR:-userfaultfd}"
export FI_CXI_DISABLE_HOST_REGISTER="${FI_CXI_DISABLE_HOST_REGISTER:-1}"
export FI_CXI_DEFAULT_CQ_SIZE="${FI_CXI_DEFAULT_CQ_SIZE:-131072}"
export FI_CXI_RX_MATCH_MODE="${FI_CXI_RX_MATCH_MODE:-hybrid}"

# Caches on the node (here: in its memory), not in a home folder that thousands of ranks would write
# to.  Each node compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/tmp/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export MIOPEN_USER_DB_PATH="${MIOPEN_USER_DB_PATH:-$_ringx_cache/miopen}"
export MIOPEN_CUSTOM_CACHE_DIR="${MIOPEN_CUSTOM_CACHE_DIR:-$_ringx_cache/miopen}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|RCCL|FI|OFI|GLOO|HSA|MASTER|RINGX)_' | LC_ALL=C sort >&2 || true
