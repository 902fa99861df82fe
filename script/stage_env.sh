# shellcheck shell=bash disable=SC1090,SC2034
# Sourced by a batch script after job.sh: copies the
# Python environment to the local disk of every node, and has PYTHON run it there.
#
#   source script/job.sh frontier
#   source script/stage_env.sh            # or: STAGE=/mnt/bb/$USER source script/stage_env.sh
#   ranks "$PYTHON" -m ringx bench ...
#
# One rank packs the environment that PYTHON belongs to (compiled modules and all), sbcast sends the
# archive through Slurm's own tree to the nodes, and each node unpacks it once: a shared file system
# then sees one reader instead of one per rank and file.  env/README.md says when that pays.  STAGE
# is a folder that every node has for itself (default /tmp), with room for the archive and what is
# in it.

_prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)') || exit 1
if [ ! -f "$_prefix/pyvenv.cfg" ] && [ ! -d "$_prefix/conda-meta" ]; then
  echo "stage_env.sh: PYTHON=$PYTHON is in no virtual environment or conda prefix ($_prefix);" \
    "make one, or do not stage" >&2
  exit 1
fi
STAGE=${STAGE:-/tmp}
_name=ringx-env-$SLURM_JOB_ID
_archive=$(mktemp -d)/env.tar
_began=$SECONDS
tar -C "$_prefix" -cf "$_archive" . &&
  sbcast --force "$_archive" "$STAGE/$_name.tar" &&
  srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" \
    bash -c 'mkdir -p "$1" && tar -C "$1" -xf "$1.tar" && rm "$1.tar"' _ "$STAGE/$_name" || {
  echo "stage_env.sh: could not copy $_prefix to $STAGE on every node" >&2
  exit 1
}
echo "stage_env.sh: $(du -m "$_archive" | cut -f1) MB of $_prefix in $STAGE/$_name" \
  "on $SLURM_JOB_NUM_NODES nodes, $((SECONDS - _began)) s" >&2
rm -r "${_archive%/*}"
export PYTHON=$STAGE/$_name/bin/python
