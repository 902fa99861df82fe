# Perlmutter, GPU nodes (NERSC): HPE Cray EX, per node 4 NVIDIA A100 of 40 GB (256 nodes: 80 GB), 4
# Slingshot NICs.  Revised 2026-11-21. Untested: everything in this file; written from public
# documentation.  Unsure: the limit, the module versions, and which of the variables below the
# module nccl already sets (what it sets is kept).
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cuda
#SITE ranks-per-node    4
#SITE memory-per-rank   40                # GiB; 80 with --constraint=gpu&hbm80g
#SITE account           required
#SITE limit             1536 48:00:00     # QOS regular, nodes with 40 GB; with 80 GB: 256 nodes
#SITE srun              --gpu-bind=none --cpus-per-task=32 --cpu-bind=cores
#SBATCH --qos=regular
#SBATCH --constraint=gpu&hbm40g
#SBATCH --gpus-per-node=4
#
# --constraint=gpu alone mixes 40 GB and 80 GB nodes (the 80 GB memory is also faster): name one of
# them for anything that is compared. This file shows every rank all 4 GPUs (--gpu-bind=none), and
# ringx.launch takes that of the local rank.  The other habit, one visible GPU per rank (srun
# --gpus-per-task=1), works with ringx.launch too; but its implied binding may keep NCCL from
# reaching the neighbours over NVLink, so add --gpu-bind=none or --gres-flags=allow-task-sharing and
# look for P2P in the output of NCCL_DEBUG=INFO. GPU 0 is nearest to cores 48-63, GPU 3 to cores
# 0-15.  --cpu-bind=cores gives rank 0 the first cores, thus the far ones: it matters for host work
# only.  Unsure: --cpu-bind=map_ldom:3,2,1,0 should put each rank beside its GPU.
#
# Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_ENV       virtual environment or conda prefix with torch; default: the module pytorch
#   RINGX_TORCH     that module, default pytorch (must bring torch >= 2.8)
#   RINGX_NCCL      module with the network plugin for RINGX_ENV, default nccl
#   RINGX_CONTAINER_COMMAND   Shifter instead: "shifter --module=gpu,nccl-plugin --image=NAME"
#                   (see env/container-python)

# shellcheck shell=bash disable=SC1090,SC1091
if [ -n "${RINGX_CONTAINER_COMMAND:-}" ]; then
    _ringx_modules= # the container brings torch, and shifter's module the plugin
    export PYTHON="${PYTHON:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/container-python}"
elif [ -n "${RINGX_ENV:-}" ]; then
    _ringx_modules="cudatoolkit ${RINGX_NCCL:-nccl}"
else
    _ringx_modules="${RINGX_TORCH:-pytorch}"
fi
for _ringx_module in $_ringx_modules; do
    module load "$_ringx_module" || {
        echo "ringx: env/perlmutter.sh (Perlmutter): cannot load module $_ringx_module;" \
            "see 'module spider', then edit the file" >&2
        unset _ringx_module _ringx_modules
        return 1
    }
done
unset _ringx_module _ringx_modules
if [ -n "${RINGX_ENV:-}" ] && [ -z "${RINGX_CONTAINER_COMMAND:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/perlmutter.sh (Perlmutter): no bin/python in RINGX_ENV=$RINGX_ENV" >&2
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi

# Which network.  Without the plugin (aws-ofi-nccl) NCCL falls back to TCP and says so only in its
# debug output: a measurement of another network.  With NCCL_NET set it stops instead.  HPE advises
# against setting it on one node.
[ "${SLURM_JOB_NUM_NODES:-1}" -le 1 ] || export NCCL_NET="${NCCL_NET:-AWS Libfabric}"
# a prefix; where ranks find each other
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-hsn}"
# a name, not a prefix; gloo's data goes through it
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-hsn0}"
# Both decide the bandwidth that is measured: all four NICs for one ring, GPU memory read and
# written by the NIC.
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC:-1}"
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"
# Not set: NCCL_NCHANNELS_PER_NET_PEER.  Before comparing with point-to-point rings, read
# env/alps.sh and try 4, for all that is compared. libfabric: against deadlocks and overflow, not
# for speed.
export FI_MR_CACHE_MONITOR="${FI_MR_CACHE_MONITOR:-userfaultfd}"
export FI_CXI_DISABLE_HOST_REGISTER="${FI_CXI_DISABLE_HOST_REGISTER:-1}"
export FI_CXI_DEFAULT_CQ_SIZE="${FI_CXI_DEFAULT_CQ_SIZE:-131072}"
export FI_CXI_RX_MATCH_MODE="${FI_CXI_RX_MATCH_MODE:-hybrid}"

# Caches on the node (here: in its memory), not in a home folder that thousands of ranks would write
# to.  Each node compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/tmp/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|FI|OFI|GLOO|MASTER|RINGX)_' | LC_ALL=C sort >&2 || true
