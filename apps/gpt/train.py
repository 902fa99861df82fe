"""Train a small Llama on text, its sequence cut over the ranks by ringx.

    python -m apps.gpt.train --preset tiny --dtype fp64 --out run                     # one process
    python -m apps.gpt.train --preset tiny --dtype fp64 --out run --nproc 4           # four ranks on this machine
    torchrun --nproc-per-node 4 -m apps.gpt.train --preset tiny --dtype fp64 --out run
    srun -n 4 python -m apps.gpt.train --preset tiny --dtype fp64 --out run

Expect of --preset tiny (20 steps of 2 x 512 bytes, seed 0) on the standard library of Python 3.11, the default text there:

    step     0        4        9        14       19
    loss     5.3350   4.3550   3.2288   3.3193   2.9658

in fp64 the same to 1e-9 on any number of ranks, with every algorithm and layout; fp32 and bf16 agree to about 1e-6 and 1e-3.
Other Pythons have other sources: 5.3 falling to about 3.

Tokens, pre-shifted labels and positions are cut by one ``ringx.Sharding``, so that any length runs on any number of ranks.
Writes OUT/log.jsonl: a header (configuration, versions, launch, data), then a record per step.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common.gradients import clip_gradients, differing, sum_gradients, sum_over
from apps.common.log import JsonLog, versions
from apps.common.schedule import warmup_cosine
from apps.gpt.config import DTYPES, PRESETS, Config
from apps.gpt.data import Text, cut, expect_window, read
from apps.gpt.model import Llama, token_loss


@dataclass(frozen=True)
class Run:
    """What the command line asks for besides the configuration."""

    data: str | None = None
    out: str | None = None
    save_params: str | None = None


def train(
    config: Config,
    text: Text,
    *,
    group: "dist.ProcessGroup | None" = None,
    device: "torch.device | str" = "cpu",
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Llama:
    """The whole training: every rank of `group` calls it with the same arguments and ends with the same parameters."""
    c, device = config.train, torch.device(device)
    cp = ringx.comm.Group.of(group)
    expect_window(text, c.seqlen)
    fingerprint = torch.tensor([int(text.sha256[:15], 16)], device=device)
    if differing({"text": fingerprint}, cp):
        raise RuntimeError("the ranks have read different texts (another Python or file on some node?); name one file with --data.")

    layout = ringx.Sharding(c.seqlen, cp.world, c.layout)  # of tokens, labels, positions and attention alike

    def attend(q, k, v):  # [B, S_local, heads, D]
        return ringx.attention(
            q, k, v, group=group, algorithm=c.algorithm, causal=True, layout=layout, kernel=c.kernel, overlap=c.overlap
        )

    dtype = DTYPES[c.dtype]
    master = torch.promote_types(dtype, torch.float32)  # of parameters, gradients and optimizer
    low_precision = partial(torch.autocast, device.type, dtype=dtype) if dtype != master else contextlib.nullcontext
    model = Llama.make(config.model, attend, seed=c.seed, dtype=master, device=device)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": c.weight_decay},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(c.beta1, c.beta2),
        eps=c.eps,
    )

    for step in range(c.steps):
        began = time.perf_counter()
        tokens, labels = text.batch(step, batch=c.batch, seqlen=c.seqlen, seed=c.seed)  # [B, S], global
        mine = cut(tokens, labels, layout=layout, group=group, device=device)  # [B, S_local]
        with low_precision():
            logits = model(mine.tokens, mine.positions)
        loss = token_loss(logits, mine.labels) / mine.count  # what this rank's tokens add to the batch's loss
        loss.backward()
        sum_gradients(params, cp)
        norm = clip_gradients(params, c.clip)
        lr = warmup_cosine(step, steps=c.steps, peak=c.lr, warmup=c.warmup, floor=c.floor)
        for g in optimizer.param_groups:
            g["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        record = {"step": step, "loss": float(sum_over(loss.detach(), cp)), "grad_norm": float(norm), "lr": lr}
        seconds = time.perf_counter() - began  # the sums above waited for the slowest rank and the device
        on_step({**record, "tokens_per_s": c.batch * c.seqlen / seconds, "seconds": seconds})
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            raise FloatingPointError(f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}; lower --lr?")

    if bad := differing(model.state_dict(), cp):
        raise RuntimeError(f"after training, these parameters differ between ranks: {', '.join(bad)}.")
    return model


# ---- a rank


def work(world: Any, config: Config, run: Run) -> None:
    """One rank's job.  Rank 0 alone writes and prints."""
    ringx.launch.announce(world)
    text = read(run.data)
    chief = world.rank == 0
    c = config.train
    records: list[dict[str, Any]] = []
    path = Path(run.out) / "log.jsonl" if run.out and chief else None
    with JsonLog(path) as log, _progress(config, world.world, chief) as show:
        log.write(
            kind="header",
            config=asdict(config),
            versions=versions(),
            launch={"world": world.world, "launcher": world.launcher, "backend": world.backend, "device": str(world.device)},
            data={"source": text.source, "bytes": len(text.tokens), "sha256": text.sha256},
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

        def on_step(record: dict[str, Any]) -> None:
            records.append(record)
            log.write(**record)
            show(record)

        model = train(config, text, device=world.device, on_step=on_step)
    if not chief:
        return
    if run.save_params:
        torch.save({name: p.cpu() for name, p in model.state_dict().items()}, run.save_params)
    rates = sorted(r["tokens_per_s"] for r in records)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{config.name}: {size:,} parameters, {c.steps} steps of {c.batch} x {c.seqlen} tokens, {c.algorithm} on {world.world} "
        f"rank(s), {c.dtype}: loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}, {rates[len(rates) // 2]:,.0f} tokens/s"
        + (f"; log in {path}" if path else ""),
        flush=True,
    )


@contextlib.contextmanager
def _progress(config: Config, world: int, chief: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What to call with each step's record: a progress bar at a terminal, a line elsewhere, nothing on other ranks."""
    if not chief:
        yield lambda record: None
    elif not sys.stdout.isatty():
        yield lambda record: print(_line(record), flush=True)
    else:
        from rich.progress import Progress

        with Progress() as bar:
            task = bar.add_task(f"{config.name} on {world} rank(s)", total=config.train.steps)

            def show(record: dict[str, Any]) -> None:
                bar.console.print(_line(record), highlight=False)
                bar.advance(task)

            yield show


def _line(r: dict[str, Any]) -> str:
    return (
        f"step {r['step']:4d}  loss {r['loss']:.6f}  grad norm {r['grad_norm']:.4f}  lr {r['lr']:.2e}  "
        f"{r['tokens_per_s']:,.0f} tokens/s"
    )


# ---- the command line


class Parser(argparse.ArgumentParser):
    """Mistakes in one line, of one rank, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        with contextlib.suppress(ValueError):  # launcher's variables that make no sense may be what the message is about
            if ringx.launch.detect(device="cpu").rank:
                time.sleep(2)  # launchers end all ranks when the first one fails: let rank 0 speak
                self.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    p = Parser("python -m apps.gpt.train", description="Train a small Llama on text, its sequence cut over the ranks by ringx.")
    p.add_argument("--preset", default="tiny", choices=sorted(PRESETS), help="model and training to start from (default: tiny)")
    p.add_argument(
        "--nproc", type=int, help="ranks to start on this machine (default: 1, or the ranks of torchrun, srun or mpirun)"
    )
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    p.add_argument("--data", metavar="FILE", help="text to train on (default: this Python's standard library)")
    p.add_argument("--out", metavar="DIR", help="write DIR/log.jsonl, replacing an older one")
    p.add_argument("--save-params", metavar="FILE", help="save the final parameters with torch.save")
    t = p.add_argument_group("in place of the preset's")
    t.add_argument("--algorithm", help=", ".join(ringx.algorithms()))
    t.add_argument("--layout", help="zigzag, contiguous or striped; uneven shards where the length asks for them")
    t.add_argument("--kernel", help="local attention kernel, or auto")
    t.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=None, help="communicate while computing")
    t.add_argument("--steps", type=int)
    t.add_argument("--seqlen", type=int, help="global sequence length")
    t.add_argument("--batch", type=int, help="sequences per step")
    t.add_argument("--lr", type=float, help="peak learning rate")
    t.add_argument("--warmup", type=int, help="steps of linear warm-up")
    t.add_argument("--dtype", help=", ".join(DTYPES))
    t.add_argument("--seed", type=int)
    return p


def configure(args: argparse.Namespace) -> tuple[Config, Run]:
    """Everything that can be known to be wrong before ranks start raises ValueError or NotImplementedError here."""
    config = PRESETS[args.preset]
    given = {name: value for name, value in vars(args).items() if hasattr(config.train, name) and value is not None}
    config = replace(config, train=replace(config.train, **given))
    c, m = config.train, config.model
    world = ringx.launch.world_size(args.nproc) or 1  # 0: this MPI does not say before the ranks have met
    device = ringx.launch.detect(device=args.device).device
    ringx.Sharding(c.seqlen, world, c.layout)
    expect_window(read(args.data), c.seqlen)
    if device.type == "cpu":  # can the kernel do it?  (on GPUs the ranks find out: this process need not hold one)
        q, k = (torch.zeros(1, 2, heads, m.head_dim, dtype=DTYPES[c.dtype], requires_grad=True) for heads in (m.heads, m.kv_heads))
        ringx.attention(q, k, k, algorithm=c.algorithm, causal=True, layout="contiguous", kernel=c.kernel, check=False)
    for flag, file in (("--out", args.out and Path(args.out) / "log.jsonl"), ("--save-params", args.save_params)):
        if file:
            _expect_writable(flag, Path(file))
    return config, Run(args.data, args.out, args.save_params)


def _expect_writable(flag: str, file: Path) -> None:
    """Makes the file's directory; ValueError if it could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{flag}: {file.parent} is no directory and cannot be made: {e.strerror}.") from None
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{flag}: {file} cannot be written.")


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        config, run = configure(args)
    except (ValueError, NotImplementedError) as e:
        p.error(str(e))
    ringx.launch.run(work, args.nproc, config, run, device=args.device)
    return 0


if __name__ == "__main__":
    from apps.gpt.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
