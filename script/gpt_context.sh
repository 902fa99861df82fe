#!/bin/bash
# The real run of apps/gpt/longer.yaml on four ranks, and the same model at 1K, 4K and 16K tokens of
# context, on as many tokens:
#   script/gpt_context.sh results/gpt_cpu2_202611
# Half an hour on two cores.  Keeps metrics, configurations, figures and what one process reached.
set -euo pipefail
out=$1
here=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-$(mktemp -d)}
export OMP_NUM_THREADS=1
python=${PYTHON:-python3}
cd "$here"
train() {
  "$python" -m apps.gpt.train --config apps/gpt/longer.yaml --data "$work/text8k" --no-tensorboard \
    "$@"
}

"$python" -m apps.gpt.prepare --out "$work/text8k" --vocab 8192
[ -f "$work/one/metrics.jsonl" ] || train --out "$work/one"
train --nproc 4 --cp 4 --out "$work/cp4"
short="--steps 60 --val-every 15"                     # 60 steps of 16,384 tokens each
train $short --nproc 2 --cp 2 --seqlen 1024 --global-batch 16 --val-batches 3 --out "$work/1K"
train $short --nproc 2 --cp 2 --seqlen 4096 --global-batch 4 --val-batches 3 --out "$work/4K"
train $short --nproc 2 --cp 2 --seqlen 16384 --global-batch 1 --val-batches 3 --out "$work/16K"
for run in one cp4 1K 4K 16K; do
  mkdir -p "$out/$run"
  cp "$work/$run"/{metrics.jsonl,config.yaml} "$out/$run/"
done
"$python" -m apps.common.plot "$out/one" "$out/cp4" --out "$out/plots/longer"
"$python" -m apps.common.plot "$out/1K" "$out/4K" "$out/16K" --out "$out/plots/contexts"
