"""Train a Llama 3 on text, over context, tensor and data parallel ranks.

    python -m apps.gpt.train --preset tiny --out run                          # one process
    python -m apps.gpt.train --preset tiny --cp 2 --dp 2 --nproc 4 --out run  # four ranks here
    torchrun --nproc-per-node 4 apps/gpt/train.py --preset tiny --cp 2 --tp 2 --out run
    srun -n 4 python apps/gpt/train.py --preset tiny --out run
    python -m apps.gpt.train --resume run --cp 4 --nproc 4                    # go on, on any mesh
    python -m apps.gpt.train --preset 8b-1m --cp 128 --dp 32 --dry-run        # for 4,096 ranks

Expect of --preset tiny (20 steps of 4 x 512 tokens, seed 0) on the standard library of Python 3.11,
the default text there:

    step     0        4        9        14       19
    loss     5.7729   5.2641   4.9213   4.7982   4.7081

in fp64 the same to 1e-9 on any mesh, with every algorithm, layout and engine.  Other Pythons have
other sources: about as much.

OUT holds config.yaml and run.json (what was run), metrics.jsonl and tensorboard/ (a record per
step), checkpoints/, and data/ where the text had to be made into tokens first.
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
DEFAULT_OUT = "gpt_out"
OTHER_ORDER = "the data would come in another order"


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
    """``run_steps`` on sequences of text; every rank calls it with the same arguments.

    Args:
        config: that of the run.
        tokens: the text to train on.
        mesh, engine, attend: of this rank; `attend` is the attention of the engine's model.
        val: the text held back, where the configuration asks for validation.
        first, on_step, before_step: as of ``run_steps``."""
    train_config = config.train
    global_batch, micro_batch, _ = config.plan_batch(mesh.shape)
    local_rows = config.my_samples(mesh.shape, mesh.dp_rank)
    tokens_per_step = global_batch * train_config.seqlen

    def read(source: Tokens, step: int) -> Rows:
        return source.rows(
            step,
            global_batch=global_batch,
            seqlen=train_config.seqlen,
            seed=train_config.seed,
            rows=local_rows,
        )

    def read_train(step: int) -> Rows:
        return read(tokens, step)

    def split_into_passes(rows: Rows) -> list[tuple]:
        """(tokens, positions, labels) of this rank for each pass."""
        pieces = [tensor.split(micro_batch) for tensor in rows]
        passes = []
        for micro_rows in zip(*pieces, strict=True):
            batch = shard_rows(
                Rows(*micro_rows), layout=attend.layout, group=mesh.cp, device=engine.device
            )
            passes.append((batch.tokens, batch.positions, batch.labels))
        return passes

    def validate() -> dict[str, float]:
        if val is None:
            return {}
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for i in range(train_config.val_batches):
                for inputs in split_into_passes(read(val, i)):
                    loss += engine(*inputs) / (tokens_per_step * train_config.val_batches)
        return {"val_loss": float(engine.sum(loss))}

    work = StepWork(
        read=read_train,
        parts=split_into_passes,
        count=tokens_per_step,
        tokens=tokens_per_step,
        flops=flops_per_token(config.model, train_config.seqlen),
        validate=validate,
    )
    run_steps(
        train_config, engine, attend, work, first=first, on_step=on_step, before_step=before_step
    )


class GptRun(TrainingRun):
    """A run on prepared text."""

    prog = PROG
    loss_unit = "nats per token"
    must_match = (
        ("train", "seqlen", OTHER_ORDER),
        ("train", "global_batch", OTHER_ORDER),
        ("train", "seed", OTHER_ORDER),
    )
    config: Config

    def open_data(self) -> None:
        folder = ringx.launch.decide(self.world, self._prepare_data)
        try:
            self.tokens = open_dataset(folder)
            local_identity = self.tokens.sha256
        except ValueError as e:  # of this rank alone: another node may not see the folder
            local_identity = str(e)
        identities = set(ringx.launch.gather(local_identity, self.world))
        if len(identities) > 1:
            raise ValueError(
                f"--data: the ranks see different files in {folder}; "
                "put it (or --out) where all nodes see the same. "
                f"They see: {'; '.join(sorted(identities))}"
            )
        self.val = open_dataset(folder, "val") if self.config.train.val_every else None

    def _prepare_data(self) -> Path:
        """The prepared folder, which is made or checked on rank 0."""
        train_config, model = self.config.train, self.config.model
        folder = dataset_for(self.options.data, self.out / "data", vocab=model.vocab)
        tokens = open_dataset(folder)
        tokens.check_vocab(model.vocab)
        tokens.check_range()
        expect_window(tokens, train_config.seqlen)
        if train_config.val_every:
            expect_window(open_dataset(folder, "val"), train_config.seqlen)
        return folder

    def data_sha256(self) -> str:
        return self.tokens.sha256

    def data_metadata(self) -> dict[str, Any]:
        tokens = self.tokens
        return {
            "source": tokens.source,
            "tokens": tokens.length,
            "sha256": tokens.sha256,
            "folder": str(tokens.folder.resolve()),  # for those who go on without naming it
        }

    def describe(self) -> str:
        total = parameters(self.config.model).total
        text = f"{self.tokens.source}, {self.tokens.length:,} tokens"
        return f"data: {text}; model: {total:,} parameters"

    def write_extra_files(self) -> None:
        # For those who take the weights from here.
        tokenizer = self.tokens.folder / "tokenizer.json"
        if self.tokens.folder != self.out / "data" and tokenizer.exists():
            shutil.copyfile(tokenizer, self.out / "tokenizer.json")

    def build_engine(self, weights: bool) -> Engine:
        self.attend = Attend(self.config, self.mesh)
        initial: Any = None
        if weights and self.options.init:
            initial = open_weights(self.options.init, self.config.model, self.world)
        elif weights:
            initial = "new"
        return build(self.config, self.mesh, self.attend, device=self.world.device, weights=initial)

    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        train(
            self.config,
            self.tokens,
            self.mesh,
            self.engine,
            self.attend,
            val=self.val,
            first=first,
            on_step=on_step,
            before_step=before_step,
        )

    def describe_step(self) -> str:
        return f"{self.config.train.global_batch} x {self.config.train.seqlen} tokens"


def work(world: World, options: RunOptions) -> int:
    """One rank's part; returns the process's exit status."""
    return GptRun(world, options).main()


# ---- the command line


def parser() -> Parser:
    p = Parser(
        PROG, description="Train a Llama 3 on text, over context, tensor and data parallel ranks."
    )
    command.add_run_flags(
        p,
        preset=f"model and training to start from: {', '.join(PRESETS)} "
        "(default: the model of --init, or tiny)",
        data="text, JSONL, Parquet, a folder of such, or one made by apps/gpt/prepare.py "
        "(default: the resumed run's, or this Python's standard library)",
        out=DEFAULT_OUT,
    )
    p.add_argument(
        "--init",
        metavar="DIR",
        help="first weights: a Hugging Face Llama folder, a run, or a checkpoint",
    )
    add_flags(p, "training, in place of the preset's", TrainConfig)
    return p


def configure(args: argparse.Namespace) -> tuple[RunOptions, Shape | None]:
    """(the options, the mesh if it is known yet).

    Raises:
        ValueError, NotImplementedError: for everything that can be known to be wrong before ranks
            start."""
    command.expect_preset_or_config(args)
    config, shape = command.configure(args, base_config(args))
    options = RunOptions(
        config=config,
        out=args.out or args.resume or DEFAULT_OUT,
        data=args.data or resumed_data_path(args.resume),
        resume=args.resume,
        init=args.init,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
    )
    if not command.is_estimate(args):
        model = config.model
        command.expect_runnable(
            options,
            args,
            heads=(model.heads, model.kv_heads),
            head_dim=model.head_dim,
            causal=True,
        )
    return options, shape


def base_config(args: argparse.Namespace) -> Config:
    """What the flags change.

    It is a preset, a YAML file, the configuration of the run that is resumed, or the model of the
    weights."""
    config_file = command.config_file(args)
    if config_file:
        return load(config_file)
    if args.init and not args.preset and Path(args.init).is_dir():
        return Config(Path(args.init).resolve().name, open_model(args.init).model)
    return preset(args.preset or "tiny")


def resumed_data_path(run: str | None) -> str | None:
    """The prepared folder that a run has read; None if it is not there any more, or has none."""
    folder = command.resumed_data(run).get("folder")
    return folder if folder and Path(folder).is_dir() else None


def estimate(config: Config, shape: Shape) -> Any:
    from apps.gpt.estimate import estimate_step  # here: it imports torch's testing tools

    return estimate_step(config, shape)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the greatest exit status of its ranks."""
    return command.main(parser(), argv, configure, estimate, work)


if __name__ == "__main__":
    from apps.gpt.train import main  # under its own name, so that started ranks find `work`

    sys.exit(main())
