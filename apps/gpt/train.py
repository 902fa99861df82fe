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
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import ringx
from apps.common import command
from apps.common.arguments import Parser
from apps.common.config import add_flags
from apps.common.engine import Engine
from apps.common.loop import Record, StepWork, run_steps
from apps.common.run import RunOptions, TrainingRun
from apps.gpt.config import PRESETS, Config, TrainConfig, load, preset
from apps.gpt.data.dataset import Rows, Tokens, expect_window, open_dataset, shard_rows
from apps.gpt.data.prepare import dataset_for
from apps.gpt.flops import flops_per_token, parameters
from apps.gpt.huggingface import open_model, open_weights
from apps.gpt.parallel import Attend, build
from ringx.launch import World
from ringx.launch.mesh import Mesh, Shape

PROG = "apps.gpt.train"


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
    """``run_steps`` on sequences of text; every rank calls it with the same arguments."""
    c = config.train
    total, micro, _ = config.plan_batch(mesh.shape)
    mine = config.my_samples(mesh.shape, mesh.dp_rank)
    count = total * c.seqlen

    def rows(source: Tokens, step: int) -> Rows:
        return source.rows(step, global_batch=total, seqlen=c.seqlen, seed=c.seed, rows=mine)

    def parts(read: Rows) -> list[tuple]:
        pieces = zip(*(x.split(micro) for x in read), strict=True)
        batches = [
            shard_rows(Rows(*piece), layout=attend.layout, group=mesh.cp, device=engine.device)
            for piece in pieces
        ]
        return [(b.tokens, b.positions, b.labels) for b in batches]

    def validate() -> dict[str, float]:
        if val is None:
            return {}
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for i in range(c.val_batches):
                for part in parts(rows(val, i)):
                    loss += engine(*part) / (count * c.val_batches)
        return {"val_loss": float(engine.sum(loss))}

    flops = flops_per_token(config.model, c.seqlen)
    work = StepWork(lambda step: rows(tokens, step), parts, count, count, flops, validate)
    run_steps(c, engine, attend, work, first=first, on_step=on_step, before_step=before_step)


class GptRun(TrainingRun):
    """A run on prepared text."""

    prog = PROG
    loss_unit = "nats per token"
    must_match = tuple(
        ("train", k, "the data would come in another order")
        for k in ("seqlen", "global_batch", "seed")
    )
    config: Config

    def open_data(self) -> None:
        c, model = self.config.train, self.config.model

        def ask() -> Path:
            folder = dataset_for(self.options.data, self.out / "data", vocab=model.vocab)
            text = open_dataset(folder)
            text.check_vocab(model.vocab)
            text.check_range()
            expect_window(text, c.seqlen)
            if c.val_every:
                expect_window(open_dataset(folder, "val"), c.seqlen)
            return folder

        folder = ringx.launch.decide(self.world, ask)
        try:
            self.tokens = open_dataset(folder)
            mine = self.tokens.sha256
        except ValueError as e:  # of this rank alone: another node may not see the folder
            mine = str(e)
        if len(seen := set(ringx.launch.gather(mine, self.world))) > 1:
            raise ValueError(
                f"--data: the ranks see different files in {folder}; put it (or --out) where all nodes see the same. "
                f"They see: {'; '.join(sorted(seen))}"
            )
        self.val = open_dataset(folder, "val") if c.val_every else None

    def data_sha256(self) -> str:
        return self.tokens.sha256

    def data_metadata(self) -> dict[str, Any]:
        t = self.tokens
        folder = str(t.folder.resolve())  # for those who go on without naming it
        return {"source": t.source, "tokens": t.length, "sha256": t.sha256, "folder": folder}

    def describe(self) -> str:
        total = parameters(self.config.model).total
        return f"data: {self.tokens.source}, {self.tokens.length:,} tokens; model: {total:,} parameters"

    def write_extra_files(self) -> None:
        tokenizer = self.tokens.folder / "tokenizer.json"
        if self.tokens.folder != self.out / "data" and tokenizer.exists():
            shutil.copyfile(
                tokenizer, self.out / "tokenizer.json"
            )  # for those who take the weights from here

    def build_engine(self, weights: bool) -> Engine:
        self.attend = Attend(self.config, self.mesh)
        first: Any = None
        if weights:
            first = (
                open_weights(self.options.init, self.config.model, self.world)
                if self.options.init
                else "new"
            )
        return build(self.config, self.mesh, self.attend, self.world.device, weights=first)

    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        how: dict[str, Any] = {"first": first, "on_step": on_step, "before_step": before_step}
        train(self.config, self.tokens, self.mesh, self.engine, self.attend, val=self.val, **how)

    def describe_step(self) -> str:
        return f"{self.config.train.global_batch} x {self.config.train.seqlen} tokens"


def work(world: World, job: RunOptions) -> int:
    """One rank's job; returns the process's exit status."""
    return GptRun(world, job).main()


# ---- the command line


def parser() -> Parser:
    p = Parser(
        PROG, description="Train a Llama 3 on text, over context, tensor and data parallel ranks."
    )
    command.add_run_flags(
        p,
        preset=f"model and training to start from: {', '.join(PRESETS)} (default: the model of --init, or tiny)",
        data="text, JSONL, Parquet, a folder of such, or one made by apps/gpt/prepare.py (default: the resumed run's, or this "
        "Python's standard library)",
        out="gpt_out",
    )
    p.add_argument(
        "--init",
        metavar="DIR",
        help="first weights: a Hugging Face Llama folder, a run, or a checkpoint",
    )
    add_flags(p, "training, in place of the preset's", TrainConfig)
    return p


def configure(args: argparse.Namespace) -> tuple[RunOptions, Shape | None]:
    """(the job, its mesh if it is known yet).  Everything that can be known to be wrong before ranks start raises ValueError or
    NotImplementedError here."""
    if args.preset and args.config:
        raise ValueError(
            "--preset and --config: give one; a YAML file may itself start from a preset."
        )
    config, shape = command.configure(args, base_of(args))
    out = args.out or args.resume or "gpt_out"
    job = RunOptions(
        config,
        out,
        args.data or data_of(args.resume),
        args.resume,
        args.init,
        args.tensorboard,
        args.wandb,
    )
    if not (args.estimate or args.dry_run):
        m = config.model
        command.expect_runnable(
            job, args, heads=(m.heads, m.kv_heads), head_dim=m.head_dim, causal=True
        )
    return job, shape


def base_of(args: argparse.Namespace) -> Config:
    """What the flags change: a preset, a YAML file, the configuration of the run that is resumed, or the model of the weights."""
    if args.config:
        return load(args.config)
    if not args.preset and (resumed := command.resumed_config(args.resume)):
        return load(resumed)
    if args.init and not args.preset and Path(args.init).is_dir():
        return Config(Path(args.init).resolve().name, open_model(args.init).model)
    return preset(args.preset or "tiny")


def data_of(run: "str | None") -> "str | None":
    """The prepared folder that a run has read; None if it is not there any more, or the run has none."""
    folder = command.resumed_data(run).get("folder")
    return folder if folder and Path(folder).is_dir() else None


def plan(config: Config, shape: Shape) -> Any:
    from apps.gpt.estimate import estimate_step  # here: it imports torch's testing tools

    return estimate_step(config, shape)


def main(argv: "list[str] | None" = None) -> int:
    return command.main(parser(), argv, configure, plan, work)


if __name__ == "__main__":
    from apps.gpt.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
