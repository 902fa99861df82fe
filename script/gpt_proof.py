"""Shows what the GPT trainer promises, with real processes, and keeps what was seen.

    python script/gpt_proof.py product --out results/gpt_cpu2_202611
    python script/gpt_proof.py kills --out results/gpt_cpu2_202611

product   20 steps of the tiny preset (4 x 512 tokens, the default text) on each mesh with FSDP2 and
          ringx3, in fp64 (losses and every parameter equal one process's to 1e-9) and in fp32 at a
          constant rate of 3e-4 (losses to 1e-4); each other engine on two meshes; each other
          algorithm on (2, 1, 1) and (4, 1, 1).  Writes product.json and product.md.
kills     one run of 600 small steps is killed (kill -9) twenty times at random moments, also while
          it saves, and started again; then its curve and its last parameters are compared, bit for
          bit, with those of a run that was left alone.  Writes kills.json.
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
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp

import ringx

ROOT = Path(__file__).resolve().parents[1]
MESHES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (3, 1, 1))
ENGINES = ("ddp", "zero1", "zero2", "zero3")
DTYPE_FLAGS = {
    "fp64": ["--dtype", "float64"],
    "fp32": ["--dtype", "float32", "--lr", "3e-4", "--schedule", "wsd"],
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

Reached = tuple[list[float], dict[str, torch.Tensor]]  # a run's losses and its last parameters


def train_command(*flags: object) -> list[str]:
    return [sys.executable, "-m", "apps.gpt.train", *map(str, flags), "--no-tensorboard"]


def train(*flags: object, check: bool = True) -> subprocess.CompletedProcess:
    """Runs the trainer to its end; check: SystemExit if it fails."""
    command = train_command(*flags)
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """The parameters of the run's last checkpoint."""
    path = max((run / "checkpoints").glob("step-????????"))
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        for name, metadata in stored.items()
        if name.startswith("model.")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


# ---- product


class ProductCase(NamedTuple):
    """What is compared with one process."""

    cp: int
    tp: int
    dp: int
    engine: str
    algorithm: str
    dtype: str


def product_cases() -> list[ProductCase]:
    cases = []
    for dtype in ("fp64", "fp32"):
        for mesh in MESHES:
            cases.append(ProductCase(*mesh, "fsdp", "ringx3", dtype))
    for engine in ENGINES:
        for mesh in ((2, 1, 1), (2, 1, 2)):
            # ZeRO keeps parameters in fp32.
            dtype = "fp64" if engine == "ddp" else "fp32"
            cases.append(ProductCase(*mesh, engine, "ringx3", dtype))
    for algorithm in ringx.algorithms():
        if algorithm != "ringx3":
            for mesh in ((2, 1, 1), (4, 1, 1)):
                cases.append(ProductCase(*mesh, "fsdp", algorithm, "fp64"))
    return cases


def product(out: Path, work: Path) -> bool:
    """Every mesh, engine and algorithm against one process: whether all is as promised."""
    one_process: dict[str, Reached] = {}
    for dtype, flags in DTYPE_FLAGS.items():
        train("--preset", "tiny", *flags, "--out", work / dtype)
        one_process[dtype] = losses(work / dtype), parameters(work / dtype)
    rows = []
    for number, case in enumerate(product_cases()):
        row = compare_with_one_process(
            case, one_process[case.dtype], run=work / f"case{number}", data=work / "fp64/data"
        )
        rows.append(row)
        print(row, flush=True)
    result = {"torch": torch.__version__, "rows": rows}
    (out / "product.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "product.md").write_text(product_table(rows))
    return all(row.get("ok", True) for row in rows)


def compare_with_one_process(
    case: ProductCase, one_process: Reached, *, run: Path, data: Path
) -> dict[str, Any]:
    """Trains a case in the folder `run`; returns its row of the table."""
    row: dict[str, Any] = case._asdict()
    flags: list[object] = ["--preset", "tiny", *DTYPE_FLAGS[case.dtype]]
    flags += ["--algorithm", case.algorithm, "--dp-engine", case.engine]
    flags += ["--cp", case.cp, "--tp", case.tp, "--dp", case.dp]
    flags += ["--nproc", case.cp * case.tp * case.dp]
    flags += ["--out", run, "--data", data]
    done = train(*flags, check=case.engine in ("fsdp", "ddp"))  # ZeRO may be refused
    if done.returncode:
        row["refused"] = done.stderr.strip().splitlines()[-1]
        return row
    expected_losses, expected_parameters = one_process
    run_losses, run_parameters = losses(run), parameters(run)
    pairs = zip(expected_losses, run_losses, strict=True)
    row["loss"] = max(abs(expected - reached) for expected, reached in pairs)
    row["parameters"] = max(
        (run_parameters[name] - expected).abs().max().item()
        for name, expected in expected_parameters.items()
    )
    row["fell"] = run_losses[0] - run_losses[-1]
    if case.dtype == "fp64":
        is_equal = max(row["loss"], row["parameters"]) <= 1e-9
    else:
        is_equal = row["loss"] <= 1e-4
    row["ok"] = row["fell"] >= 0.3 and is_equal
    return row


def product_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| cp | tp | dp | engine | algorithm | dtype | largest difference of a loss "
        "| of a parameter | loss fell by | as promised |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row[name]) for name in ProductCase._fields]
        if "refused" in row:
            cells += [row["refused"], "", "", "refused"]
        else:
            cells += [f"{row['loss']:.1e}", f"{row['parameters']:.1e}", f"{row['fell']:.2f}"]
            cells.append("yes" if row["ok"] else "NO")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- kills

SMALL = """
preset: tiny
model: {dim: 64, layers: 2, ffn: 128}
train: {seqlen: 64, global_batch: 2, steps: 600, save_every: 8}
"""


def kills(out: Path, work: Path, times: int = 20) -> bool:
    """Kill -9, `times` times: whether the curve and the parameters stay the same."""
    config = work / "small.yaml"
    config.write_text(SMALL)
    train("--config", config, "--out", work / "alone")
    run = work / "run"
    flags = ["--config", config, "--data", work / "alone/data", "--out", run, "--resume", run]
    moments = random.Random(1)
    killed = []
    for number in range(times):
        # Every other time while a checkpoint is being written.
        kill = start_and_kill(flags, run, delay=moments, await_saving=number % 2 == 1)
        if kill is None:
            break  # the run had come to its end
        killed.append(kill)
        print(kill, flush=True)
    train(*flags)
    same_losses = losses(run) == losses(work / "alone")
    run_parameters = parameters(run)
    same_parameters = all(
        torch.equal(expected, run_parameters[name])
        for name, expected in parameters(work / "alone").items()
    )
    result = {
        "kills": killed,
        "losses_bitwise_equal": same_losses,
        "parameters_bitwise_equal": same_parameters,
        "torch": torch.__version__,
    }
    (out / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    while_saving = sum(kill["while_saving"] for kill in killed)
    print(
        f"{len(killed)} kills, {while_saving} of them while saving: "
        f"bitwise equal {same_losses} {same_parameters}"
    )
    return same_losses and same_parameters and len(killed) == times


def start_and_kill(
    flags: list[object], run: Path, *, delay: random.Random, await_saving: bool
) -> dict[str, Any] | None:
    """Starts the run and kills it within a second of its first step, or while it saves.

    Returns at which steps it began and was killed, and whether it was saving; None if no step was
    left to do."""
    process = subprocess.Popen(
        train_command(*flags), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = None
    for line in process.stdout:
        if match := re.match(r"step +(\d+)|resumed from .* after (\d+) steps", line):
            first = int(match[1] or match[2])
            break
    if first is None:
        return None
    time.sleep(delay.uniform(0.0, 1.0))
    checkpoints = run / "checkpoints"
    end = time.monotonic() + 10
    while await_saving and time.monotonic() < end and not list(checkpoints.glob("*.partial")):
        time.sleep(0.0005)
    is_saving = bool(list(checkpoints.glob("*.partial")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
    return {"began_at": first, "killed_at": killed_at, "while_saving": is_saving}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("product", "kills"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prove = {"product": product, "kills": kills}[args.what]
    with tempfile.TemporaryDirectory() as work:
        return 0 if prove(args.out, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main())
