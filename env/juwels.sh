# JUWELS Booster (JSC): per node 4 NVIDIA A100 of 40 GB, 4 HDR200 InfiniBand adapters, DragonFly+.
# Revised 2026-11-21. Untested: everything in this file; written from public documentation.  Unsure:
# the modules and their stage, how CPUs are counted with SMT, and whether the scheduler (psslurm)
# shows each rank one GPU when nothing is asked for.
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cuda
#SITE ranks-per-node    4
#SITE memory-per-rank   40                # GiB
#SITE account           required
#SITE limit             384 24:00:00      # booster; more nodes in largebooster, on request
#SITE srun              --cpus-per-task=12
#SBATCH --partition=booster
#SBATCH --gres=gpu:4
#
# CUDA_VISIBLE_DEVICES is left to the scheduler, which is expected to show each of 4 ranks the GPU
# nearest to its cores: one visible GPU per rank, as with --gpus-per-task=1.  The other habit, all 4
# visible (export CUDA_VISIBLE_DEVICES=0,1,2,3 before `ringx submit`: a value that is set is kept),
# works with ringx.launch too: it takes the GPU of the local rank, wherever its cores are.  If
# NCCL_DEBUG=INFO shows SHM instead of P2P inside a node, take that one.
#
# Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_ENV       virtual environment or conda prefix with torch >= 2.8, under the same modules
#   RINGX_STAGE     software stage, default 2026
#   RINGX_MODULES   modules of the stage, default "GCC Python CUDA"; "GCC Python PyTorch" if the
#                   stage's PyTorch is new enough

# shellcheck shell=bash disable=SC1090,SC1091
# The address of rank 0 before anything else: it can
# fail.  A node's plain name leads to Ethernet, which does not reach every cell; the name with an
# "i" appended is its InfiniBand address.  ringx.launch takes MASTER_ADDR before all else; the port
# follows from job and step.
_ringx_host=${MASTER_ADDR:-}
if [ -z "$_ringx_host" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    _ringx_host="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)i"
    getent hosts "$_ringx_host" >/dev/null || {
        echo "ringx: env/juwels.sh (JUWELS Booster): host $_ringx_host has no address;" \
            "set MASTER_ADDR to rank 0's on InfiniBand" >&2
        unset _ringx_host
        return 1
    }
fi
for _ringx_module in "Stages/${RINGX_STAGE:-2026}" ${RINGX_MODULES:-GCC Python CUDA}; do
    module load "$_ringx_module" || {
        echo "ringx: env/juwels.sh (JUWELS Booster): cannot load module $_ringx_module;" \
            "see 'module spider', then edit the file" >&2
        unset _ringx_module _ringx_host
        return 1
    }
done
unset _ringx_module
if [ -n "${RINGX_ENV:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/juwels.sh (JUWELS Booster): no bin/python in RINGX_ENV=$RINGX_ENV" >&2
        unset _ringx_host
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi
# steps that leave out the job's first node need their own
[ -z "$_ringx_host" ] || export MASTER_ADDR="$_ringx_host"
unset _ringx_host

# Where ranks find each other.  NCCL's data goes through the four InfiniBand adapters themselves,
# gloo's through IP on ib0.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-ib0}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-ib0}"
# Large jobs meet links that flap: NCCL_IB_TIMEOUT=22 (longer waits before giving up) lets them
# recover.  Not set: such a wait inside a measured repetition is an outlier that a benchmark should
# see.  Nor NCCL_NCHANNELS_PER_NET_PEER: see env/alps.sh before comparing with point-to-point rings.

# Caches on the node, not in a home folder that thousands of ranks would write to.  Each node
# compiles for itself: the first calls are slow, and belong to a benchmark's warm-up.
_ringx_cache="/tmp/ringx-${USER:-$UID}-${SLURM_JOB_ID:-0}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$_ringx_cache/triton}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_ringx_cache/extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$_ringx_cache/inductor}"
unset _ringx_cache

# Into the job's log: what was measured under which settings.
env | grep -E '^(NCCL|UCX|GLOO|MASTER|CUDA_VISIBLE)_' | LC_ALL=C sort >&2 || true
