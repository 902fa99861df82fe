"""Train a Llama 3 on text, over context, tensor and data parallel ranks.

    python -m apps.gpt.train --preset tiny --out run                                   # one process
    python -m apps.gpt.train --preset tiny --cp 2 --dp 2 --nproc 4 --out run           # four ranks on this machine
    torchrun --nproc-per-node 4 apps/gpt/train.py --preset tiny --cp 2 --tp 2 --out run
    srun -n 4 python apps/gpt/train.py --preset tiny --out run
    python -m apps.gpt.train --resume run --cp 4 --nproc 4                             # go on, on any mesh
    python -m apps.gpt.train --preset 8b-1m --cp 128 --dp 32 --dry-run                 # what 4,096 ranks would do

Expect of --preset tiny (20 steps of 4 x 512 tokens, seed 0) on the standard library of Python 3.11, the default text there:

    step     0        4        9        14       19
    loss     5.7729   5.2641   4.9213   4.7982   4.7081

in fp64 the same to 1e-9 on any mesh, with every algorithm, layout and engine.  Other Pythons have other sources: about as much.

OUT holds config.yaml and run.json (what was run), metrics.jsonl and tensorboard/ (a record per step), checkpoints/, and data/ where
the text had to be made into tokens first.
"""

import argparse
import dataclasses
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common.arguments import Parser
from apps.common.checkpoint import Checkpoints
from apps.common.engine import Engine
from apps.common.log import Metrics, expect_loggers, progress, read_sessions, write_header
from apps.common.schedule import rate
from apps.common.zero import expect_possible
from apps.gpt.config import DTYPES, PRESETS, Config, MeshConfig, TrainConfig, load, preset
from apps.gpt.data import Batch, Loader, Rows, Tokens, cut, dataset_for, expect_window, open_dataset
from apps.gpt.flops import flops_per_token, parameters, peak_flops
from apps.gpt.huggingface import open_model, weights_for
from apps.gpt.parallel import Attend, build
from ringx.launch import World
from ringx.mesh import Mesh, Shape
from ringx.stopping import AGAIN, Stopped, Watch

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What the command line asks for besides the configuration."""

    config: Config
    out: str
    data: str | None = None
    resume: str | None = None
    init: str | None = None
    tensorboard: bool | str = "auto"
    wandb: str | None = None


# ---- training


def train(
    config: Config,
    tokens: Tokens,
    mesh: Mesh,
    engine: Engine,
    attend: Attend,
    *,
    val: Tokens | None = None,
    first: int = 0,
    on_step: Callable[[Record], None] = lambda record: None,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps first, first + 1, ... of the run; every rank calls it with the same arguments.

    on_step is called after each step with its record, before_step(step) before it and once after the last (step = steps): the
    place to save and to stop.

    Raises:
        FloatingPointError: loss or gradient is not finite; nothing of that step is to be saved."""
    c = config.train
    total, micro, passes = config.plan_batch(mesh.shape)
    mine = range(mesh.dp_rank * micro * passes, (mesh.dp_rank + 1) * micro * passes)  # rows of the global batch
    count = total * c.seqlen
    flops, peak = flops_per_token(config.model, c.seqlen), peak_flops(engine.device)

    def rows(source: Tokens, step: int) -> Rows:
        return source.rows(step, global_batch=total, seqlen=c.seqlen, seed=c.seed, rows=mine)

    def parts(read: Rows) -> list[Batch]:
        pieces = zip(*(x.split(micro) for x in read), strict=True)
        return [cut(Rows(*piece), layout=attend.layout, group=mesh.cp, device=engine.device) for piece in pieces]

    def validate() -> float:
        assert val is not None
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for i in range(c.val_batches):
                for b in parts(rows(val, i)):
                    loss += engine(b.tokens, b.positions, b.labels) / (count * c.val_batches)
        return float(engine.sum(loss))

    with Loader(tokens, rows, first, c.steps) as batches:
        for step in range(first, c.steps):
            before_step(step)
            began = time.perf_counter()
            attend.check = step == first  # wrong calls would be wrong in the first step already
            loss = torch.zeros((), dtype=torch.float64, device=engine.device)
            for i, b in enumerate(parts(next(batches))):
                with engine.accumulate(last=i == passes - 1):
                    part = engine(b.tokens, b.positions, b.labels) / count  # what this rank's tokens add to the batch's loss
                    engine.backward(part)
                loss += part.detach()
            lr = rate(c.schedule, step, steps=c.steps, peak=c.lr, warmup=c.warmup, decay=c.decay, floor=c.floor)
            norm = float(engine.step(lr, c.clip))
            record: Record = {"step": step, "loss": float(engine.sum(loss)), "grad_norm": norm, "lr": lr}
            seconds = time.perf_counter() - began  # the sums above waited for the slowest rank and the device
            per_rank = count / seconds / mesh.shape.world
            record |= {
                "tokens": (step + 1) * count,
                "tokens_per_s": count / seconds,
                "seconds": seconds,
                "data_wait_share": batches.waited / seconds,
                "peak_memory_bytes": _peak_memory(engine.device),
                "tflops_per_rank_full": flops.full * per_rank / 1e12,
                "tflops_per_rank_causal": flops.causal * per_rank / 1e12,
                "mfu_full": flops.full * per_rank / peak if peak else None,
                "mfu_causal": flops.causal * per_rank / peak if peak else None,
            }
            if not math.isfinite(record["loss"] + norm):
                raise FloatingPointError(f"step {step}: loss {record['loss']}, gradient norm {norm}; lower --lr?")
            if val is not None and c.val_every and ((step + 1) % c.val_every == 0 or step + 1 == c.steps):
                record["val_loss"] = validate()
            on_step(record)
        before_step(c.steps)


def _peak_memory(device: torch.device) -> int:
    """Of this rank, bytes: allocated on its GPU; on a CPU, where torch counts nothing, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- a rank


def work(world: World, job: Job) -> int:
    """One rank's job; returns the process's exit status.  Rank 0 alone writes and prints."""
    chief = world.rank == 0
    ringx.launch.announce(world)
    say: Callable[[str], None] = lambda text: print(text, flush=True) if chief else None  # noqa: E731
    with Watch() as watch, Checkpoints(Path(job.out) / "checkpoints", world, keep=job.config.train.keep, say=say) as checkpoints:
        try:
            ready = prepare(world, job, checkpoints, say)
        except ValueError as e:  # of all ranks alike: what can only be known here
            if chief:
                print(f"{PROG}: error: {e}", file=sys.stderr, flush=True)
            return 2
        return _train(world, job, checkpoints, watch, say, *ready)


def prepare(world: World, job: Job, checkpoints: Checkpoints, say: Callable[[str], None]) -> tuple:
    """Everything before the first step: (config, tokens, val, mesh, engine, attend, first).  Raises ValueError on all ranks."""
    out, c = Path(job.out), job.config.train

    def ask() -> Path:
        folder = dataset_for(job.data, out / "data", vocab=job.config.model.vocab)
        text = open_dataset(folder)
        text.check_vocab(job.config.model.vocab)
        text.check_range()
        expect_window(text, c.seqlen)
        if c.val_every:
            expect_window(open_dataset(folder, "val"), c.seqlen)
        return folder

    prepared = ringx.launch.decide(world, ask)
    try:
        tokens = open_dataset(prepared)
        mine = tokens.sha256
    except ValueError as e:  # of this rank alone: another node may not see the folder
        mine = str(e)
    if len(seen := set(ringx.launch.gather(mine, world))) > 1:
        raise ValueError(
            f"--data: the ranks see different files in {prepared}; put it (or --out) where all nodes see the same. "
            f"They see: {'; '.join(sorted(seen))}"
        )
    val = open_dataset(prepared, "val") if c.val_every else None

    mesh = Mesh.make(job.config.mesh.fit(world.world), world.device.type)
    total, *_ = job.config.plan_batch(mesh.shape)
    config = replace(job.config, train=replace(c, global_batch=total))
    found, source = None, checkpoints
    if job.resume:
        source = checkpoints if Path(job.resume) == out else Checkpoints(Path(job.resume) / "checkpoints", world, say=say)
        found = source.newest()
        if found:
            ringx.launch.decide(world, lambda: expect_same_run(found[1], config, tokens))
        folder = Path(job.resume) / "checkpoints"
        held = ringx.launch.decide(world, lambda: any(folder.glob("step-????????")))
        if not found and (held or Path(job.resume) != out):
            raise ValueError(
                f"--resume {job.resume}: there is no checkpoint in it that can be used; begin again with another --out."
            )

    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        if prepared != out / "data" and (prepared / "tokenizer.json").exists():
            shutil.copyfile(prepared / "tokenizer.json", out / "tokenizer.json")  # for those who take the weights from here
    say(config.to_yaml() + mesh.shape.describe())
    sizes = parameters(config.model)
    say(f"data: {tokens.source}, {tokens.length:,} tokens; model: {sizes.total:,} parameters")

    attend = Attend(config, mesh)
    weights: Any = "new"
    if found:
        weights = None  # the checkpoint has them
    elif job.init:
        weights = weights_for(job.init, config.model, world)
    engine = build(config, mesh, attend, world.device, weights=weights)
    first = 0
    if found:
        path, about = found
        state = engine.state()
        source.load(path, state)
        engine.load(state)
        first = about["step"]
        say(f"resumed from {path}, after {first} steps")
    elif job.resume:
        say(f"{job.resume} holds no checkpoint yet: starting at step 0")
    return config, tokens, val, mesh, engine, attend, first


def expect_same_run(about: Record, config: Config, tokens: Tokens) -> None:
    """ValueError naming what a checkpoint's run had that this one has not."""
    if "data" not in about:
        raise ValueError("--resume: the checkpoint holds weights alone, as convert.py writes; begin from them with --init.")
    then, now = about["config"], dataclasses.asdict(config)
    differ = [k for k in now["model"] if then["model"].get(k) != now["model"][k]]
    if differ:
        k = differ[0]
        raise ValueError(
            f"--resume: the checkpoint is of another model: its {k} is {then['model'].get(k)}, here {now['model'][k]}."
        )
    for k in ("seqlen", "global_batch", "seed"):
        if then["train"][k] != now["train"][k]:
            raise ValueError(
                f"--resume: the checkpoint's run has {k} {then['train'][k]}, here it is {now['train'][k]}: the data would come in "
                f"another order; give --{k.replace('_', '-')} {then['train'][k]}, or start a new run from its weights with --init."
            )
    if about["data"] != tokens.sha256:
        raise ValueError(f"--resume: the checkpoint's run read other data than {tokens.source}; name the same with --data.")


def _train(world, job, checkpoints, watch, say, config, tokens, val, mesh, engine, attend, first) -> int:
    c, out, chief = config.train, Path(job.out), world.rank == 0
    as_dict = dataclasses.asdict(config)
    saved = first

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            checkpoints.save(step, engine.state(), {"step": step, "config": as_dict, "data": tokens.sha256})
            saved = step

    def before_step(step: int) -> None:
        if step == c.steps or (c.save_every and step % c.save_every == 0):
            save(step)
        try:
            watch.meet(world)
        except Stopped:
            save(step)
            raise

    records: list[Record] = []
    if chief:
        launch = {"world": world.world, "launcher": world.launcher, "backend": world.backend, "device": str(world.device)}
        data = {"source": tokens.source, "tokens": tokens.length, "sha256": tokens.sha256}
        data["folder"] = str(tokens.folder.resolve())  # for those who go on without naming it
        write_header(out, {"config": as_dict, "launch": launch, "data": data, "loss_unit": "nats per token"}, start_step=first)
    log = Metrics(out if chief else None, start_step=first, tensorboard=job.tensorboard, wandb=job.wandb, config=as_dict)
    with log, progress(c.steps, first, config.name, chief=chief) as show:

        def on_step(record: Record) -> None:
            records.append(record)
            log.write(record)
            show(record)

        try:
            train(config, tokens, mesh, engine, attend, val=val, first=first, on_step=on_step, before_step=before_step)
            stopped = False
        except Stopped:
            stopped = saved < c.steps
        except FloatingPointError as e:  # on all ranks
            if chief:
                print(f"{PROG}: error: {e}", file=sys.stderr, flush=True)
            return 1
    checkpoints.finish()
    if stopped:
        say(f"stopped by {watch.told or 'another rank'} after {saved} steps, all saved; go on with --resume {out}")
        return AGAIN if saved > first else 1
    if records:
        rates = sorted(r["tokens_per_s"] for r in records)
        say(
            f"{config.name}: steps {first} to {c.steps - 1} of {c.global_batch} x {c.seqlen} tokens, {c.algorithm} on "
            f"{world.world} rank(s), {c.dtype}: loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}, "
            f"{rates[len(rates) // 2]:,.0f} tokens/s; in {out}"
        )
    else:
        say(f"{config.name}: all {c.steps} steps were done already; in {out}")
    return 0


# ---- the command line

PROG = "apps.gpt.train"


def parser() -> Parser:
    p = Parser(PROG, description="Train a Llama 3 on text, over context, tensor and data parallel ranks.")
    p.add_argument(
        "--preset", help=f"model and training to start from: {', '.join(PRESETS)} (default: the model of --init, or tiny)"
    )
    p.add_argument("--config", metavar="FILE", help="the same from a YAML file, such as a run's config.yaml")
    p.add_argument("--data", help="text, JSONL, Parquet, a folder of such, or one made by apps/gpt/prepare.py (default: the "
                   "resumed run's, or this Python's standard library)")  # fmt: skip
    p.add_argument("--out", metavar="DIR", help="folder of the run (default: the resumed one, or gpt_out)")
    p.add_argument("--resume", metavar="DIR", help="go on with the run in DIR from its newest whole checkpoint")
    p.add_argument("--init", metavar="DIR", help="first weights: a Hugging Face Llama folder, a run, or a checkpoint")
    p.add_argument("--nproc", type=int, help="ranks to start here (default: 1, or the ranks of torchrun, srun or mpirun)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    p.add_argument("--timeout", type=float, default=600.0, help="seconds that ranks wait for each other (default: 600)")
    p.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default="auto", help="default: where it is installed")
    p.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")
    p.add_argument("--estimate", action="store_true", help="print the memory that a rank needs, and end; needs no GPU")
    p.add_argument("--dry-run", action="store_true", help="print mesh, memory, bytes and FLOPs of a step, and end; needs no GPU")
    for title, kind in (("mesh", MeshConfig), ("training, in place of the preset's", TrainConfig)):
        group = p.add_argument_group(title)
        for f in dataclasses.fields(kind):
            flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
            if f.type is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=about)
                continue
            choices = f.metadata["choices"]
            if choices:
                about = f"{about}: {', '.join(choices)}"
            group.add_argument(flag, type=f.type, default=None, metavar=None if choices else "N", help=about)  # type: ignore[arg-type]
    return p


def configure(args: argparse.Namespace) -> tuple[Job, Shape | None]:
    """(the job, its mesh if it is known yet).  Everything that can be known to be wrong before ranks start raises ValueError or
    NotImplementedError here."""
    if args.preset and args.config:
        raise ValueError("--preset and --config: give one; a YAML file may itself start from a preset.")
    config = base_of(args)
    flags = {name: value for name, value in vars(args).items() if value is not None}
    axes = {"cp", "tp", "dp"}
    if args.resume and axes & set(flags):  # the old mesh's other axes are not meant
        config = replace(config, mesh=replace(config.mesh, cp=0, tp=0, dp=0))
    config = config.changed(flags)
    planning = args.estimate or args.dry_run
    if planning:
        m = config.mesh
        world = args.nproc or max(m.cp, 1) * max(m.tp, 1) * max(m.dp, 1)
    else:
        world = ringx.launch.world_size(args.nproc) or 0  # 0: this MPI does not say before the ranks have met
        if args.resume and world and not axes & set(flags) and _misfits(config.mesh, world):
            config = replace(config, mesh=replace(config.mesh, cp=0, tp=0, dp=0))
    shape = config.mesh.fit(world) if world else None
    if shape:
        config.expect_fits(shape)
    out = args.out or args.resume or "gpt_out"
    data = args.data or (data_of(args.resume) if args.resume else None)
    job = Job(config, out, data, args.resume, args.init, args.tensorboard, args.wandb)
    if not planning:
        _expect_runnable(job, args)
    return job, shape


def base_of(args: argparse.Namespace) -> Config:
    """What the flags change: a preset, a YAML file, the configuration of the run that is resumed, or the model of the weights."""
    if args.config:
        return load(args.config)
    if args.resume and not args.preset and (Path(args.resume) / "config.yaml").exists():
        return load(str(Path(args.resume) / "config.yaml"))
    if args.init and not args.preset and Path(args.init).is_dir():
        return Config(Path(args.init).resolve().name, open_model(args.init).model)
    return preset(args.preset or "tiny")


def data_of(run: str) -> str | None:
    """The prepared folder that a run has read; None if it is not there any more, or the run has none."""
    sessions = read_sessions(run)
    folder = sessions[-1].get("data", {}).get("folder") if sessions else None
    return folder if folder and Path(folder).is_dir() else None


def _misfits(mesh: MeshConfig, world: int) -> bool:
    try:
        mesh.fit(world)
    except ValueError:
        return True
    return False


def _expect_runnable(job: Job, args: argparse.Namespace) -> None:
    c, m = job.config.train, job.config.model
    expect_loggers(job.tensorboard, job.wandb)
    kinds = DTYPES[c.dtype], DTYPES[c.reduce_dtype]
    expect_possible(job.config.mesh.dp_engine, optimizer=c.optimizer, dtype=kinds[0], reduce_dtype=kinds[1])
    device = ringx.launch.detect(device=args.device).device
    if device.type == "cpu":  # can the kernel do it?  (on GPUs the ranks find out: this process need not hold one)
        heads = (m.heads, m.kv_heads)
        q, k = (torch.zeros(1, 2, n, m.head_dim, dtype=DTYPES[c.dtype], requires_grad=True) for n in heads)
        ringx.attention(q, k, k, algorithm=c.algorithm, causal=True, layout="contiguous", kernel=c.kernel, check=False)
        if c.offload:
            raise ValueError("--offload moves activations from a GPU to its host; this run is on the CPU.")
    if c.offload and c.checkpointing == "none":
        raise ValueError(
            "--offload keeps the inputs of checkpointed blocks on the host; give --checkpointing selective or full too."
        )
    out = Path(job.out)
    if job.init and job.resume:
        raise ValueError("--init and --resume: a resumed run has its weights; give one.")
    if job.init and not Path(job.init).is_dir():
        raise ValueError(f"--init {job.init}: there is no such folder.")
    if job.resume and Path(job.resume) != out and not (Path(job.resume) / "checkpoints").is_dir():
        raise ValueError(f"--resume {job.resume}: there is no run in it (no checkpoints/).")
    if job.resume and not args.out and not Path(job.resume).is_dir():
        raise ValueError(
            f"--resume {job.resume}: there is no such folder; name a run's, or give --out {job.resume} too, to begin it."
        )
    held = (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step-*"))
    if held and not job.resume:
        raise ValueError(f"--out {out} holds a run with checkpoints; go on with --resume {out}, or take another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".writable", "w"):
            pass
        (out / ".writable").unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"--out {out} cannot be written: {e.strerror}.") from None


def main(argv: "list[str] | None" = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        job, shape = configure(args)
        if args.estimate or args.dry_run:
            from apps.gpt.plan import make_plan  # here: it imports torch's testing tools

            assert shape is not None
            if args.dry_run:
                print(job.config.to_yaml() + shape.describe())
            print(make_plan(job.config, shape).table(memory_only=not args.dry_run))
            return 0
    except (ValueError, NotImplementedError) as e:
        p.error(str(e))
    return max(ringx.launch.run(work, args.nproc, job, device=args.device, timeout=args.timeout))


if __name__ == "__main__":
    from apps.gpt.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
