# shellcheck shell=bash disable=SC1090,SC2034
# Sourced by every batch script, in the checkout: source
# script/job.sh SITE [PYTHON].  Loads env/SITE.sh and gives the script
#
#   $PYTHON            the Python to run: what the environment or the site says, PYTHON, the
#                      checkout's .venv, python3
#   $TASKS             how many ranks the job has
#   ranks COMMAND...   starts COMMAND on all tasks of the job and waits for it.  Slurm's warning
#                      before a time limit (#SBATCH --signal=B:USR1@120 sends SIGUSR1 to the batch
#                      script) is passed on to the ranks
#   job_end            ends the script with the status of `ranks`.  Ranks that stopped early on a
#                      warning end with status 75: the job then puts itself back into the queue,
#                      unless the script has set on_limit=leave (a chained job follows)
#
# It stops the script where something is missing, before any rank starts.

RINGX_SITE=${1:-}
_default_python=${2:-}
if [ ! -f "env/$RINGX_SITE.sh" ]; then
  echo "job.sh: there is no site '$RINGX_SITE' in $PWD/env" >&2
  exit 2
fi
source "env/$RINGX_SITE.sh" || exit 1
if [ -z "${PYTHON:-}" ]; then
  for PYTHON in "$_default_python" .venv/bin/python python3; do
    command -v "${PYTHON:-none}" >/dev/null && break
  done
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "job.sh: no Python; set PYTHON to the one that has torch and ringx" >&2
  exit 1
fi
TASKS=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
export RINGX_SITE PYTHON PYTHONUNBUFFERED=1
# RINGX_SRUN: more options for srun, one word each, such as RINGX_SRUN="--cpu-bind=none"
_site_srun=$(sed -n 's/^#SITE srun  *//p' "env/$RINGX_SITE.sh" | sed 's/ # .*//' | tr '\n' ' ')
read -r -a _srun <<<"$_site_srun ${RINGX_SRUN:-}"
_status=0

ranks() {
  local warned=
  trap 'warned=1' USR1
  # A rank ignores the warning until its program listens; it is repeated until all ranks have ended.
  # The first rank that ends with a status other than 0 has srun end the others, and then srun
  # reports how *they* ended: so only rank 0 says 75, after the others.
  srun --kill-on-bad-exit=1 "${_srun[@]}" bash -c '
    trap "" USR1
    "$@"
    status=$?
    if [ "$status" = 75 ]; then
      [ "${SLURM_PROCID:-0}" = 0 ] || exit 0
      [ "${SLURM_NTASKS:-1}" = 1 ] || sleep 5
    fi
    exit "$status"' ranks "$@" &
  local steps=$!
  while :; do
    wait "$steps"
    _status=$?
    kill -0 "$steps" 2>/dev/null || break          # wait also returns when a signal arrives
    while [ -n "$warned" ] && kill -USR1 "$steps" 2>/dev/null; do sleep 3; done
  done
  trap - USR1
  return "$_status"
}

job_end() {
  if [ "$_status" = 75 ] && [ "${on_limit:-requeue}" = requeue ]; then
    echo "job.sh: back into the queue, to do the rest (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60    # Slurm ends this script meanwhile
  fi
  exit "$_status"
}
