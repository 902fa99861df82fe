"""Does another commit give the same results, bit for bit, and is it as fast?  For changes that must
change neither.

    python script/compare_commits.py 5211e1b~1                      # that commit against the
                                                                    working tree
    python script/compare_commits.py OLD NEW --out results/same.json
    python script/compare_commits.py OLD --speed                    # seconds of both, measured in
                                                                    turn (needs 2 idle cores)

A fixed set of results is made in a checkout of each commit, by its public names and command lines
only:

    attention   out, lse, dq, dk, dv and bytes sent of ringx1 to ringx4: layouts, masks, dtypes,
                overlap, uneven lengths, N ranks
    apps        losses and gradient norms of the first steps of both trainers on two ranks, in fp64
    estimates   what --dry-run of both trainers prints
    scripts     the batch scripts that `ringx submit --dry-run` renders for every site
    records     what `ringx bench` and `ringx bench-comm` write, without times, dates, hosts and
                commit
    tables      the CSV files of `ringx collect` and `ringx plot` from the records in results/

Exit status 1 if anything differs.  About ten minutes on two cores.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ringx

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("ringx1", "ringx2", "ringx3", "ringx4")
LAYOUTS = ("contiguous", "zigzag", "striped")
SITES = ("alps", "frontier", "generic-cpu", "generic-gpu", "juwels", "lumi", "perlmutter")
Results = dict[str, Any]


def main() -> int:
    args = parser().parse_args()
    if args.collect:
        results = measure_speed() if args.speed else collect(Path.cwd())
        Path(args.collect).write_text(json.dumps(results))
        return 0
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(checkout(args.old))
        new = stack.enter_context(checkout(args.new)) if args.new else ROOT
        if args.speed:
            report = compare_speed(old, new, args.rounds)
        else:
            report = compare(run_in(old, speed=False), run_in(new, speed=False))
        report = {"old": commit_of(old), "new": commit_of(new), **report}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report.get("different") else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("old", nargs="?", help="commit to compare with")
    p.add_argument("new", nargs="?", help="commit that is compared (default: the working tree)")
    p.add_argument("--speed", action="store_true", help="compare seconds instead of results")
    p.add_argument("--rounds", type=int, default=5, help="of --speed (default: 5)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the comparison as JSON")
    p.add_argument("--collect", metavar="FILE", help=argparse.SUPPRESS)  # in one of the checkouts
    return p


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with that commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def commit_of(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_in(tree: Path, speed: bool) -> Results:
    """This script's `--collect` with the ringx and apps of that tree."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--collect", str(file)]
        command += ["--speed"] if speed else []
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tree, env=environment, check=True)
        return json.loads(file.read_text())


def compare(old: Results, new: Results) -> Results:
    """Prints a line for each group of results, and for each one that differs."""
    different = []
    print(f"{'results':<12} {'compared':>9} {'different':>10}")
    for group in old:
        names = sorted(set(old[group]) | set(new[group]))
        differing = [n for n in names if old[group].get(n) != new[group].get(n)]
        print(f"{group:<12} {len(names):>9} {len(differing):>10}")
        different += [f"{group}: {name}" for name in differing]
    for name in different:
        group, _, key = name.partition(": ")
        print(f"\n{name}\n  old {old[group].get(key)}\n  new {new[group].get(key)}")
    compared = {group: len(results) for group, results in old.items()}
    return {"compared": compared, "different": different}


# ---- results, made in the tree that is the current folder


def collect(tree: Path) -> Results:
    assert Path(ringx.__file__).is_relative_to(tree), "another ringx than this tree's"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        return {
            "attention": attention_results(),
            "apps": app_results(scratch),
            "estimates": estimate_results(),
            "scripts": script_results(tree),
            "records": record_results(scratch),
            "tables": table_results(tree, scratch),
        }


def attention_results() -> Results:
    results: Results = {}
    for world_size in (1, 2, 3, 4):
        for of_rank in ringx.launch.run(attention_on_rank, world_size):
            results |= of_rank
    return results


def attention_on_rank(world: ringx.launch.World) -> Results:
    """{case: digests of what this rank computed, and the bytes that it sent}"""
    rank, world_size = ringx.launch.detect().rank, len(ringx.launch.gather(None, world))
    results = {}
    choices = (ALGORITHMS, LAYOUTS, (False, True), (torch.float64, torch.float32, torch.bfloat16))
    for algorithm, layout, causal, dtype in itertools.product(*choices):
        for overlap, seqlen in ((True, 48), (False, 53)):
            sharding = ringx.Sharding(seqlen, world_size, layout)
            generator = torch.Generator().manual_seed(seqlen)
            shapes = [(2, seqlen, heads, 16) for heads in (4, 2, 2, 4)]
            whole = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            q, k, v, dout = (ringx.shard(x, layout=sharding) for x in whole)
            for x in (q, k, v):
                x.requires_grad_()
            with ringx.comm.traffic() as sent:
                out, lse = ringx.attention(
                    q,
                    k,
                    v,
                    algorithm=algorithm,
                    causal=causal,
                    layout=sharding,
                    overlap=overlap,
                    return_lse=True,
                )
                torch.autograd.backward((out, lse), (dout, torch.ones_like(lse)))
            made = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
            case = f"{algorithm} {layout} {'causal' if causal else 'full'} {dtype} S={seqlen}"
            results[f"{case} rank {rank} of {world_size}"] = {
                **{name: digest(x) for name, x in made.items()},
                "sent": [dict(sent.forward), dict(sent.backward)],
            }
    return results


def digest(x: torch.Tensor | None) -> str:
    assert x is not None
    content = x.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def command(*words: object) -> str:
    """What `python -m WORDS` prints."""
    line = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def app_results(scratch: Path) -> Results:
    runs = {
        "gpt": "apps.gpt.train --preset tiny --steps 4 --global-batch 2 --dtype float64",
        "vit": "apps.vit.train --patch 8 --steps 4 --dtype float64",
    }
    results = {}
    for app, words in runs.items():
        out = scratch / app
        command(*words.split(), "--nproc", 2, "--cp", 2, "--no-tensorboard", "--out", out)
        for line in (out / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            numbers = {name: record[name] for name in ("loss", "grad_norm", "lr") if name in record}
            results[f"{app} step {record['step']}"] = numbers
    return results


def estimate_results() -> Results:
    runs = {
        "gpt tiny": "apps.gpt.train --preset tiny --cp 4 --dp 2",
        "gpt tiny tp": "apps.gpt.train --preset tiny --cp 2 --tp 2 --algorithm ringx1",
        "vit": "apps.vit.train --patch 8 --cp 2 --dp 2 --algorithm ringx4",
    }
    return {name: command(*words.split(), "--dry-run") for name, words in runs.items()}


def script_results(tree: Path) -> Results:
    matrix = "--nodes 1,2 --seqlens 4096 --kv-heads 8,2 --layouts zigzag --reps 5"
    algorithms = f"--algorithms {','.join(ALGORITHMS)}"
    results = {}
    for site, job in itertools.product(SITES, ("bench", "bench-comm")):
        words = f"ringx submit --site {site} --account a1 --out /scratch/runs --dry-run --job {job}"
        words += " --nodes 2,4" if job == "bench-comm" else f" {matrix} {algorithms}"
        printed = command(*words.split())
        printed = printed.replace(sys.executable, "PYTHON")
        results[f"{site} {job}"] = printed.replace(str(tree), "TREE")
    return results


def record_results(scratch: Path) -> Results:
    out = scratch / "records"
    sizes = "--seqlens 64 --heads 4 --kv-heads 2 --head-dim 16 --dtypes fp32 --reps 1 --masks all"
    algorithms = f"--algorithms {','.join(ALGORITHMS)}"
    command(*f"ringx bench --nproc 1,2 {sizes} {algorithms} --out {out}".split())
    command(*f"ringx bench-comm --nproc 2 --max-bytes 4K --reps 3 --out {out}".split())
    results = {}
    for file in sorted(out.glob("*.json")):
        results[file.name] = without_measurements(json.loads(file.read_text()))
    return results


MEASURED = {
    *("seconds", "baseline", "efficiency_percent", "tokens_per_second", "tflops_per_rank"),
    *("date", "git", "machine", "command", "environment", "memory", "raw", "fits"),
    *("mean", "min", "median", "p99", "algbw", "busbw", "reps", "ended"),
}


def without_measurements(tree: Any) -> Any:
    """A record without what differs from run to run; of measured values only that they are
    there."""
    if isinstance(tree, dict):
        return {k: k if k in MEASURED else without_measurements(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [without_measurements(value) for value in tree]
    return tree


def table_results(tree: Path, scratch: Path) -> Results:
    results = {}
    for folder in sorted((tree / "results").iterdir()):
        tables = sorted(folder.glob("*.parquet"))
        has_records = any(folder.glob("ringx*.json"))
        if not tables and not has_records:
            continue
        out = scratch / folder.name
        command("ringx", "plot", *(tables or [folder]), "--out", out)
        if has_records:
            command("ringx", "collect", folder, "--out", out)
        for file in sorted(out.glob("*.csv")):
            content = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            results[f"{folder.name}/{file.name}"] = content
    return results


# ---- speed

SPEED_SEQLEN = 4096


def compare_speed(old: Path, new: Path, rounds: int) -> Results:
    """Medians of both trees, which take turns."""
    seconds: dict[str, dict[str, list[float]]] = {"old": {}, "new": {}}
    trees = [("old", old), ("new", new)]
    for number in range(rounds):
        for name, tree in trees:
            print(f"round {number + 1} of {rounds}, {name}", file=sys.stderr, flush=True)
            for case, values in run_in(tree, speed=True).items():
                seconds[name].setdefault(case, []).extend(values)
        trees.reverse()  # neither is always the first
    print(f"{'case':<32} {'old s':>9} {'new s':>9} {'new/old':>8} {'spread of old':>14}")
    report = {}
    for case, old_values in seconds["old"].items():
        before, after = statistics.median(old_values), statistics.median(seconds["new"][case])
        spread = (max(old_values) - min(old_values)) / before
        print(f"{case:<32} {before:9.4f} {after:9.4f} {after / before:8.3f} {spread:13.1%}")
        report[case] = {"old": before, "new": after, "ratio": after / before, "spread": spread}
    return {"seconds": report, "rounds": rounds}


def measure_speed() -> Results:
    return ringx.launch.run(speed_on_rank, 2)[0]


def speed_on_rank(world: ringx.launch.World) -> Results:
    """{case: seconds of three passes, forward and backward}; and the host's time of small calls."""
    results = {}
    for algorithm, seqlen in itertools.product(ALGORITHMS, (64, SPEED_SEQLEN)):
        shapes = [(1, seqlen // 2, heads, 64) for heads in (8, 8, 8)]
        q, k, v = (torch.randn(shape).requires_grad_() for shape in shapes)
        repetitions = 60 if seqlen == 64 else 4
        values = []
        for _ in range(repetitions):
            torch.distributed.barrier()
            start = time.perf_counter()
            out = ringx.attention(q, k, v, algorithm=algorithm, causal=True)
            out.sum().backward()
            values.append(time.perf_counter() - start)
        results[f"{algorithm} causal fp32 S={seqlen} N=2"] = values[1:]
    return results


if __name__ == "__main__":
    sys.exit(main())
