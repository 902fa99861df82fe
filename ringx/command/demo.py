"""ringx demo: the main job in minutes.  The algorithms are checked on 1, 2 and 4 ranks, measured,
plotted, and train a small Llama whose sequence is cut over the ranks.  Run it from a
checkout (it uses apps/gpt):

    ringx demo --out demo_out
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# (title, words after `python -m`)
STEPS = (
    (
        "Exactness",
        "ringx verify --nproc {ranks} --seqlens 256,251 --dtypes fp64,fp32"
        " --json {out}/verify.json",
    ),
    (
        "Time and bytes",
        "ringx bench --nproc {ranks} --seqlens 1024,2048 --masks causal --dtypes fp32"
        " --heads 8 --kv-heads 8 --head-dim 64 --reps 3 --out {out}/bench --resume",
    ),
    ("Plots", "ringx plot {out}/bench --out {out}/plots"),
)
TRAIN = (
    "apps.gpt.train --preset tiny --nproc {n} --cp {n} --steps 10 --global-batch 2 --dtype float64"
    " --out {out}/gpt_cp{n} --resume {out}/gpt_cp{n}"
)
RESULTS = ("verify.json", "plots/*.png", "gpt_cp*/metrics.jsonl")  # that a user may look at


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
            "apps/gpt, which the demo trains, is not beside this installation; "
            "use a checkout (make demo)."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    rank_counts = args.ranks.split(",")
    start = time.monotonic()
    for title, words in _steps(args.ranks, rank_counts, args.out):
        print(f"\n== {title}\n$ python -m {shlex.join(words)}", flush=True)
        command = [sys.executable, "-m", *words]
        status = subprocess.run(command, env=_environment(root), check=False).returncode
        if status:
            print(f"ringx demo: that step failed with exit status {status}", file=sys.stderr)
            return status
    _compare_losses(args.out, rank_counts)
    print(f"\nDone in {time.monotonic() - start:.0f} s.  Look at:")
    paths: list[Path] = []
    for pattern in RESULTS:
        paths += args.out.glob(pattern)
    for path in sorted(paths):
        print(f"  {path}")
    return 0


def _steps(ranks: str, rank_counts: Sequence[str], out: Path) -> list[tuple[str, list[str]]]:
    """(title, words after `python -m`) of each step."""
    steps = [(title, _fill_in(command, ranks=ranks, out=out)) for title, command in STEPS]
    for n in rank_counts:
        steps.append((f"A small Llama on {n} rank(s)", _fill_in(TRAIN, n=n, out=out)))
    return steps


def _fill_in(command: str, **values: object) -> list[str]:
    """The command's words, filled in after splitting: a folder's name may hold spaces."""
    return [word.format(**values) for word in command.split()]


def _environment(root: Path) -> dict[str, str]:
    """That of this process, in which the checkout can be imported."""
    search_path = str(root)
    if os.environ.get("PYTHONPATH"):
        search_path += os.pathsep + os.environ["PYTHONPATH"]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}


def _compare_losses(out: Path, rank_counts: Sequence[str]) -> None:
    """Prints how far the losses fell, and how far they differ between numbers of ranks."""
    curves: list[list[float]] = []
    for n in rank_counts:
        lines = (out / f"gpt_cp{n}/metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    reference = curves[0]
    differences: list[float] = []
    for curve in curves:
        for reference_loss, loss in zip(reference, curve, strict=True):
            differences.append(abs(reference_loss - loss))
    print(
        f"\nThe loss fell from {reference[0]:.3f} to {reference[-1]:.3f}; "
        f"on {', '.join(rank_counts)} ranks it differs by at most {max(differences):.1e}."
    )
