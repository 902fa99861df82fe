"""Shows what the GPT trainer promises, with real processes, and keeps what it saw.

    python script/gpt_proof.py product --out results/gpt_cpu2_202611        # every mesh, engine and algorithm against one process
    python script/gpt_proof.py kills --out results/gpt_cpu2_202611          # kill -9, twenty times, and the curve stays the same

product   20 steps of the tiny preset (4 x 512 tokens, the default text) on each mesh with FSDP2 and ringx3, in fp64 (losses and
          every parameter equal one process's to 1e-9) and in fp32 at a constant rate of 3e-4 (losses to 1e-4); each other engine
          on two meshes; each other algorithm on (2, 1, 1) and (4, 1, 1).  Writes product.json and product.md.
kills     one run of 600 small steps is killed at random moments, also while it saves, and started again; then its curve and its
          last parameters are compared, bit for bit, with those of a run that was left alone.  Writes kills.json.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import ringx

ROOT = Path(__file__).resolve().parents[1]
MESHES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (3, 1, 1))
ENGINES = ("ddp", "zero1", "zero2", "zero3")
FP64, FP32 = ("--dtype", "float64"), ("--dtype", "float32", "--lr", "3e-4", "--schedule", "wsd")


def train(*words: object, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "apps.gpt.train", *map(str, words), "--no-tensorboard"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def parameters(out: Path) -> dict[str, torch.Tensor]:
    """Of the run's last checkpoint."""
    path = max((out / "checkpoints").glob("step-????????"))
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in stored.items()
        if k.startswith("model.")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def product(out: Path, work: Path) -> bool:
    cases = [(mesh, "fsdp", "ringx3", kind) for kind in ("fp64", "fp32") for mesh in MESHES]
    cases += [
        (mesh, engine, "ringx3", "fp32" if engine != "ddp" else "fp64")
        for engine in ENGINES
        for mesh in ((2, 1, 1), (2, 1, 2))
    ]
    cases += [
        (mesh, "fsdp", a, "fp64")
        for a in ringx.algorithms()
        if a != "ringx3"
        for mesh in ((2, 1, 1), (4, 1, 1))
    ]
    alone, rows = {}, []
    for kind, flags in (("fp64", FP64), ("fp32", FP32)):
        train("--preset", "tiny", *flags, "--out", work / kind)
        alone[kind] = losses(work / kind), parameters(work / kind)
    for n, ((cp, tp, dp), engine, algorithm, kind) in enumerate(cases):
        folder = work / f"case{n}"
        words = [
            "--preset",
            "tiny",
            *(FP64 if kind == "fp64" else FP32),
            "--algorithm",
            algorithm,
            "--dp-engine",
            engine,
        ]
        words += [
            "--cp",
            cp,
            "--tp",
            tp,
            "--dp",
            dp,
            "--nproc",
            cp * tp * dp,
            "--out",
            folder,
            "--data",
            work / "fp64/data",
        ]
        row = {
            "cp": cp,
            "tp": tp,
            "dp": dp,
            "engine": engine,
            "algorithm": algorithm,
            "dtype": kind,
        }
        done = train(*words, check=engine.startswith("fsdp") or engine == "ddp")
        if done.returncode:
            row |= {"refused": done.stderr.strip().splitlines()[-1]}
        else:
            want, got = alone[kind], (losses(folder), parameters(folder))
            row["loss"] = max(abs(a - b) for a, b in zip(want[0], got[0], strict=True))
            row["parameters"] = max((got[1][k] - p).abs().max().item() for k, p in want[1].items())
            row["fell"] = got[0][0] - got[0][-1]
            row["ok"] = row["fell"] >= 0.3 and (
                max(row["loss"], row["parameters"]) <= 1e-9
                if kind == "fp64"
                else row["loss"] <= 1e-4
            )
        rows.append(row)
        print(row, flush=True)
    (out / "product.json").write_text(
        json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        "| cp | tp | dp | engine | algorithm | dtype | largest difference of a loss | of a parameter | loss fell by | as promised |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        end = (
            [r["refused"], "", "", "refused"]
            if "refused" in r
            else [*(f"{r[k]:.1e}" for k in ("loss", "parameters")), f"{r['fell']:.2f}"]
        )
        end += [] if "refused" in r else ["yes" if r["ok"] else "NO"]
        lines.append(
            "| "
            + " | ".join(
                [*(str(r[k]) for k in ("cp", "tp", "dp", "engine", "algorithm", "dtype")), *end]
            )
            + " |"
        )
    (out / "product.md").write_text("\n".join(lines) + "\n")
    return all(r.get("ok", True) for r in rows)


SMALL = """
preset: tiny
model: {dim: 64, layers: 2, ffn: 128}
train: {seqlen: 64, global_batch: 2, steps: 600, save_every: 8}
"""


def kills(out: Path, work: Path, times: int = 20) -> bool:
    (work / "small.yaml").write_text(SMALL)
    train("--config", work / "small.yaml", "--out", work / "alone")
    run, chance, seen = work / "run", random.Random(1), []
    words = [
        "--config",
        work / "small.yaml",
        "--data",
        work / "alone/data",
        "--out",
        run,
        "--resume",
        run,
        "--no-tensorboard",
    ]
    command = [sys.executable, "-m", "apps.gpt.train", *map(str, words)]
    for n in range(times):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        begun = (
            re.match(r"step +(\d+)|resumed from .* after (\d+) steps", line)
            for line in process.stdout
        )
        first = next((int(m[1] or m[2]) for m in begun if m), None)
        if first is None:
            break  # it had come to its end
        time.sleep(chance.uniform(0.0, 1.0))
        saving = n % 2 == 1  # half of them while a checkpoint is being written
        end = time.monotonic() + 10
        while (
            saving and not list((run / "checkpoints").glob("*.partial")) and time.monotonic() < end
        ):
            time.sleep(0.0005)
        partial = [p.name for p in (run / "checkpoints").glob("*.partial")]
        process.send_signal(signal.SIGKILL)
        process.wait()
        at = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
        seen.append({"began_at": first, "killed_at": at, "while_saving": bool(partial)})
        print(seen[-1], flush=True)
    train(*words[:-1])
    same = losses(run) == losses(work / "alone")
    one, other = parameters(work / "alone"), parameters(run)
    same_parameters = all(torch.equal(p, other[k]) for k, p in one.items())
    result = {
        "kills": seen,
        "losses_bitwise_equal": same,
        "parameters_bitwise_equal": same_parameters,
        "torch": torch.__version__,
    }
    (out / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(seen)} kills, {sum(k['while_saving'] for k in seen)} of them while saving: bitwise equal {same} {same_parameters}"
    )
    return same and same_parameters and len(seen) == times


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("product", "kills"))
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        return 0 if {"product": product, "kills": kills}[args.what](args.out, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main())
