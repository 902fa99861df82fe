#!/bin/bash
# Makes the study of results/study_testbed_202611 again: communication of every algorithm on 1, 2, 4
# and 8 nodes of the testbed, at links of 200 and 1000 Mbit/s.  About 25 minutes on two cores that
# nothing else uses; needs root and Slurm, see test/slurm/cluster.
#
#   script/study.sh study_out                      # then look at study_out/plots
#
# The measuring is `ringx submit` (twice a rate), the rest `ringx collect` and `ringx plot`.
set -eu
out=$(realpath -m "${1:?usage: script/study.sh FOLDER}")
cd "$(dirname "$0")/.."
ringx="${PYTHON:-.venv/bin/python} -m ringx"
cluster=test/slurm/cluster
export CL_DIR=${CL_DIR:-$(mktemp -d)/cluster} CL_NODES=8 CL_CPUS=1
trap '$cluster down' EXIT
$cluster up
for rate in 200 1000; do
  $cluster rate "$rate"
  # sizes beside the powers of two: gloo's reduce changes above 4 MiB
  $cluster exec $ringx submit --site generic-cpu --job bench-comm --nodes 2,4,8 --serial --wait \
    --out "$out/records/$rate" --label "link_mbit=$rate" \
    --options "--max-bytes 16M --also 4160K,8M --reps 7 --seconds 15"
  $cluster exec $ringx submit --site generic-cpu --nodes 1,2,4,8 --array 1 --serial --wait \
    --out "$out/records/$rate" --label "link_mbit=$rate" \
    --seqlens 2048,4096 --kv-heads 8,2 --layouts zigzag --dtypes fp32 --reps 5 --no-baseline
done
$ringx collect "$out/records" --out "$out"
$ringx plot "$out/attention.parquet" "$out/collectives.parquet" --out "$out/plots"
