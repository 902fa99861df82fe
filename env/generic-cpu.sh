# Any Slurm cluster, CPU nodes: gloo, one rank per node unless you ask for more. Revised 2026-11-21.
# Assumed: nothing but Slurm, a Python and a network between the nodes.  No modules, no limits,
# memory unknown.
#
# Sourced by a job on its first node before srun, which hands the exports to the ranks.  Facts that
# `ringx submit` checks a job against, and options that it copies into the job (env/README.md):
#SITE device            cpu
#SITE ranks-per-node    1
#SITE account           optional
#
# GPUs do not matter here: with --device cpu ringx.launch uses none, whether the scheduler shows a
# rank one (--gpus-per-task=1), all (--gpus-per-node) or none.
#
# Yours to set before `ringx submit`; a variable that is already set is kept:
#   RINGX_ENV            virtual environment or conda prefix with torch
#   GLOO_SOCKET_IFNAME   network interface; without it gloo listens on the one that leads to the
#                        other ranks

# shellcheck shell=bash
if [ -n "${RINGX_ENV:-}" ]; then
    if [ ! -x "$RINGX_ENV/bin/python" ]; then
        echo "ringx: env/generic-cpu.sh (any cluster, CPU):" \
            "no bin/python in RINGX_ENV=$RINGX_ENV" >&2
        return 1
    fi
    export PATH="$RINGX_ENV/bin:$PATH" PYTHON="${PYTHON:-$RINGX_ENV/bin/python}"
fi

# One thread per rank, so that ranks on one node do not share cores and times repeat.  It is a
# choice, not a fact of the machine: with one rank per node the other cores idle.  For the node's
# full speed set it to the cores of a rank, and add --cpus-per-task to srun.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Into the job's log: what was measured under which settings.
env | grep -E '^(OMP|MKL|GLOO|MASTER)_' | LC_ALL=C sort >&2 || true
