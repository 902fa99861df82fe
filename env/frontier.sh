# Frontier (OLCF): HPE Cray EX, per node 4 AMD MI250X = 8 GCDs of 64 GiB, 4 Slingshot NICs.
# Revised 2026-11-21. Untested: everything in this file; written from public documentation.  Unsure:
# the limits (they change), the module versions, whether max-array is counted per task, and whether
# FI_CXI_ATS still matters.
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cuda              # torch calls ROCm devices cuda
#SITE ranks-per-node    8                 # one rank per GCD
#SITE memory-per-rank   64                # GiB of a GCD
#SITE account           required
#SITE max-array         100               # jobs of a user in the queue; each array task is one
#SITE limit             91 2:00:00        # up to so many nodes: longest walltime
#SITE limit             183 6:00:00
#SITE limit             9408 12:00:00
#SITE srun              --gpus-per-task=1 --gpu-bind=closest --cpus-per-task=7
#SBATCH --partition=batch
#SBATCH --network=disable_rdzv_get
#
# This file shows each rank one GCD (srun --gpus-per-task=1), the nearest to its 7 cores (an eighth
# core per group is the system's). The other habit, all 8 visible (#SBATCH --gpus-per-node=8, srun
# without --gpus-per-task), works with ringx.launch too: rank i of a node then takes GCD i, which is
# not the one next to its cores.  Unsure: whether RCCL reaches a neighbour's GCD directly when each
# rank sees one; NCCL_DEBUG=INFO should say P2P, not SHM, inside a node.  If it says SHM, add
# --gres-flags=allow-task-sharing to srun.
#
# Yours to set before `ringx submit`; a variable that is already set is kept, except where noted:
#   RINGX_ENV           virtual environment or conda prefix with torch for the ROCm below
#   RINGX_ROCM          ROCm module, default rocm/7.1.1; of the same version as the torch wheel
#   RINGX_RCCL_PLUGIN   folder with your own librccl-net.so (aws-ofi-nccl for ROCm); default: the
#                       module rccl-net-plugin

# shellcheck shell=bash disable=SC1090,SC1091
_ringx_modules="PrgEnv-gnu ${RINGX_ROCM:-rocm/7.1.1} craype-accel-amd-gfx90a"
# after ROCm: it picks the build that fits
[ -n "${RINGX_RCCL_PLUGIN:-}" ] || _ringx_modules="$_ringx_modules rccl-net-plugin"
for _ringx_module in $_ringx_modules; do
    module load "$_ringx_module" || {
        echo "ringx: env/frontier.sh (Frontier): cannot load module $_ringx_module;" \
            "see 'module spider', then edit the file" >&2
        unset _ringx_module _ringx_modules
        return 1
    }
done
unset _ringx_module _ringx_modules
if [ -n "${RINGX_RCCL_PLUGIN:-}" ]; then
    if [ ! -e "$RINGX_RCCL_PLUGIN/librccl-net.so" ]; then
        echo "ringx: env/frontier.sh (Frontier): no librccl-net.so in" \
            "RINGX_RCCL_PLUGIN=$RINGX_RCCL_PLUGIN" >&2
        return 1
    fi
    export LD_LIBRARY_PATH="$RINGX_RCCL_PLUGIN${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi
if [ -n "${RINGX_ENV:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/frontier.sh (Frontier): no bin/python in RINGX_ENV=$RINGX_ENV" >&2
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi

# Which network.  Without the plugin RCCL falls back to TCP and says so only in its debug output: a
# measurement of another network. With NCCL_NET set it stops instead.  HPE advises against setting
# it on one node.  (Plugins from 1.12 on also answer to OFI.)
[ "${SLURM_JOB_NUM_NODES:-1}" -le 1 ] || export NCCL_NET="${NCCL_NET:-AWS Libfabric}"
# where ranks find each other; data goes through libfabric
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn0,hsn1,hsn2,hsn3}"
# gloo's data does go through these
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0,hsn1,hsn2,hsn3}"
# How RCCL uses it: all four NICs for one ring, and GPU memory read and written by the NIC (PHB,
# formerly 3).  Both decide the bandwidth that is measured; GDR is known to hang now and then: then
# set LOC (none), and compare nothing across that change.
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-1}"
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"
# Not set: NCCL_NCHANNELS_PER_NET_PEER.  Before comparing with point-to-point rings, read
# env/alps.sh and try 4, for all that is compared.

# Needed for the NIC's access to GPU memory
export HSA_FORCE_FINE_GRAIN_PCIE="${HSA_FORCE_FINE_GRAIN_PCIE:-1}"
# libfabric.  alt_read is only right in jobs with --network=disable_rdzv_get (above): keep or drop
# both.  The three zeros send every message by rendezvous, as HPE advises for RCCL: large messages
# are unchanged, small ones pay a round trip.
export FI_CXI_RDZV_PROTO="${FI_CXI_RDZV_PROTO:-alt_read}"
export FI_CXI_RDZV_EAGER_SIZE="${FI_CXI_RDZV_EAGER_SIZE:-0}"
export FI_CXI_RDZV_THRESHOLD="${FI_CXI_RDZV_THRESHOLD:-0}"
export FI_CXI_RDZV_GET_MIN="${FI_CXI_RDZV_GET_MIN:-0}"
# HPE names this and userfaultfd for RCCL
export FI_MR_CACHE_MONITOR="${FI_MR_CACHE_MONITOR:-kdreg2}"
export FI_CXI_DISABLE_HOST_REGISTER="${FI_CXI_DISABLE_HOST_REGISTER:-1}" # against deadlocks in RCCL
# room for many ranks: too small a queue stops a job,
export FI_CXI_DEFAULT_CQ_SIZE="${FI_CXI_DEFAULT_CQ_SIZE:-131072}"
# and a large one costs host memory only
export FI_CXI_DEFAULT_TX_SIZE="${FI_CXI_DEFAULT_TX_SIZE:-2048}"
# software matching when the NIC's table is full
export FI_CXI_RX_MATCH_MODE="${FI_CXI_RX_MATCH_MODE:-hybrid}"
# older plugins ask for it; unsure whether newer need it
export FI_CXI_ATS="${FI_CXI_ATS:-0}"

# Caches on the node, not in a home folder that thousands of ranks would write to.  Each node
# compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/tmp/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export MIOPEN_USER_DB_PATH="${MIOPEN_USER_DB_PATH:-$_ringx_cache/miopen}"
export MIOPEN_CUSTOM_CACHE_DIR="${MIOPEN_CUSTOM_CACHE_DIR:-$_ringx_cache/miopen}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|RCCL|FI|OFI|GLOO|HSA|MASTER)_' | LC_ALL=C sort >&2 || true
