"""ringx demo: the main job in minutes.  The four algorithms are checked on 1, 2 and 4 ranks, measured, plotted, and train a
small Llama whose sequence is cut over the ranks.  Run it from a checkout (it uses apps/gpt):

    ringx demo --out demo_out
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

STEPS = (
    (
        "Exactness",
        "ringx verify --nproc {ranks} --seqlens 256,251 --dtypes fp64,fp32 --json {out}/verify.json",
    ),
    (
        "Time and bytes",
        "ringx bench --nproc {ranks} --seqlens 1024,2048 --masks causal --dtypes fp32 --heads 8 --kv-heads 8 --head-dim 64"
        " --reps 3 --out {out}/bench --resume",
    ),
    ("Plots", "ringx plot {out}/bench --out {out}/plots"),
)
TRAIN = (
    "apps.gpt.train --preset tiny --nproc {n} --cp {n} --steps 10 --global-batch 2 --dtype float64"
    " --out {out}/gpt_cp{n} --resume {out}/gpt_cp{n}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="folder for what it makes (default: demo_out)",
    )
    parser.add_argument(
        "--ranks", default="1,2,4", metavar="N,...", help="rank counts (default: 1,2,4)"
    )


def main(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "apps/gpt/train.py").exists():
        raise FileNotFoundError(
            "apps/gpt, which the demo trains, is not beside this installation; use a checkout (make demo)."
        )
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    ranks = args.ranks.split(",")
    steps = [(title, _words(command, ranks=args.ranks, out=out)) for title, command in STEPS]
    steps += [(f"A small Llama on {n} rank(s)", _words(TRAIN, n=n, out=out)) for n in ranks]
    search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    start = time.monotonic()
    for title, words in steps:
        print(f"\n== {title}\n$ python -m {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", *words], env=env, check=False).returncode
        if status:
            print(f"ringx demo: that step failed with exit status {status}", file=sys.stderr)
            return status
    _compare_losses(out, ranks)
    print(f"\nDone in {time.monotonic() - start:.0f} s.  Look at:")
    for path in sorted(
        [*out.glob("verify.json"), *out.glob("plots/*.png"), *out.glob("gpt_cp*/metrics.jsonl")]
    ):
        print(f"  {path}")
    return 0


def _words(command: str, **values: object) -> list[str]:
    """The command's words, filled in after splitting: a folder's name may hold spaces."""
    return [word.format(**values) for word in command.split()]


def _compare_losses(out: Path, ranks: list[str]) -> None:
    curves = []
    for n in ranks:
        lines = (out / f"gpt_cp{n}/metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    apart = max(abs(a - b) for curve in curves for a, b in zip(curves[0], curve, strict=True))
    fell = f"The loss fell from {curves[0][0]:.3f} to {curves[0][-1]:.3f}"
    print(f"\n{fell}; on {', '.join(ranks)} ranks it differs by at most {apart:.1e}.")
