# shellcheck shell=bash disable=SC1090,SC2034
# Sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
# MASTER_ADDR and MASTER_PORT from Slurm's variables, for programs that do not ask Slurm themselves.
# To be sourced by every task, on every node, and needs no scontrol:
#
#   srun -n8 bash -c "source setup_dist_vars.sh; python ../test/test_ringx1.py"
#
# MASTER_ADDR and MASTER_PORT that are set already are kept.  The port follows from job and step, so
# that two jobs on one node do not meet; it is the one that ringx.launch would choose.  Programs
# that call ringx.launch.init() need none of this: it asks Slurm.

if [ -z "${SLURM_PROCID:-}" ] || [ -z "${SLURM_STEP_ID:-}" ]; then
  echo "setup_dist_vars.sh: this is no task of srun (SLURM_PROCID or SLURM_STEP_ID is not set);" \
    "use: srun bash -c 'source ...; ...'" >&2
  return 1 2>/dev/null || exit 1
fi

# of a list such as gpu[001-004,7]-ib,login: gpu001-ib
_ringx_first_host() {
  local list=$1
  while [[ $list =~ ^([^],[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
    list=${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}
  done
  echo "${list%%,*}"
}

# tasks of this step on this node, from a list such as 4(x2),3
_ringx_tasks_here() {
  local item count node=0
  local -a items
  IFS=, read -r -a items <<<"$1"
  for item in "${items[@]}"; do
    count=1
    [[ $item =~ ^([0-9]+)\(x([0-9]+)\)$ ]] && { item=${BASH_REMATCH[1]}; count=${BASH_REMATCH[2]}; }
    node=$((node + count))
    [ "$2" -lt "$node" ] && { echo "$item"; return; }
  done
}

export RANK=$SLURM_PROCID
export LOCAL_RANK=$SLURM_LOCALID
export WORLD_SIZE=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS}
_ringx_tasks=${SLURM_STEP_TASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-1}}
LOCAL_WORLD_SIZE=$(_ringx_tasks_here "$_ringx_tasks" "${SLURM_NODEID:-0}")
export LOCAL_WORLD_SIZE
_ringx_hosts=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-localhost}}
export MASTER_ADDR=${MASTER_ADDR:-$(_ringx_first_host "$_ringx_hosts")}
export MASTER_PORT=${MASTER_PORT:-$((15000 + (131 * SLURM_JOB_ID + SLURM_STEP_ID) % 12007))}
unset -v _ringx_tasks _ringx_hosts
unset -f _ringx_first_host _ringx_tasks_here
