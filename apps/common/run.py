"""A training run, as each of its ranks sees it: what is read, resumed, saved, logged and said, whatever is trained."""

import abc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ringx
from ringx.launch import World
from ringx.launch.mesh import Mesh
from ringx.launch.stopping import AGAIN, Stopped, Watch

from .checkpoint import Checkpoints
from .config import RunConfig
from .engine import Engine
from .log import Metrics, progress, write_header
from .loop import Record


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for besides the configuration."""

    config: Any
    out: str
    data: str | None = None
    resume: str | None = None
    init: str | None = None
    tensorboard: bool | str = "auto"
    wandb: str | None = None


class TrainingRun(abc.ABC):
    """One rank's part of a run.  An app says what its data and its model are."""

    prog: str  # of messages
    loss_unit: str
    # what a resumed run must have in common with its checkpoint's: (part of the configuration, field, what else would happen)
    must_match: tuple[tuple[str, str, str], ...]

    config: Any  # global_batch is filled in once the mesh is known
    mesh: Mesh
    engine: Engine

    def __init__(self, world: World, job: RunOptions):
        self.world, self.options, self.config, self.out = world, job, job.config, Path(job.out)
        self.is_main_rank = world.rank == 0  # rank 0 alone writes and prints

    def print_on_main_rank(self, text: str) -> None:
        if self.is_main_rank:
            print(text, flush=True)

    # ---- what an app says

    @abc.abstractmethod
    def open_data(self) -> None:
        """Opens the data.  Raises ValueError on all ranks alike (``ringx.launch.decide``)."""

    @abc.abstractmethod
    def data_sha256(self) -> str:
        """Of the data that ``open`` has opened."""

    @abc.abstractmethod
    def data_metadata(self) -> dict[str, Any]:
        """What run.json says of the data; "source" is its name for people."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: the data and the model."""

    @abc.abstractmethod
    def build_engine(self, weights: bool) -> Engine:
        """The engine; weights: with first weights (else a checkpoint has them)."""

    @abc.abstractmethod
    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        """``run_steps`` of this run."""

    @abc.abstractmethod
    def describe_step(self) -> str:
        """What a step is made of, such as "4 x 512 tokens"."""

    def complete_config(self) -> None:  # noqa: B027 - as below
        """Fills in what is known of `config` once its global batch is; called after ``open``, on all ranks."""

    def write_extra_files(self) -> None:  # noqa: B027 - some apps have nothing to add
        """More files in `out` that belong to the run; called on rank 0."""

    # ---- the run

    def main(self) -> int:
        """Runs it; returns the process's exit status."""
        ringx.launch.announce(self.world)
        with (
            Watch() as watch,
            Checkpoints(
                self.out / "checkpoints",
                self.world,
                keep=self.config.train.keep,
                report=self.print_on_main_rank,
            ) as checkpoints,
        ):
            try:
                first = self._prepare(checkpoints)
            except ValueError as e:  # of all ranks alike: what can only be known here
                if self.is_main_rank:
                    print(f"{self.prog}: error: {e}", file=sys.stderr, flush=True)
                return 2
            return self._train(checkpoints, watch, first)

    def _prepare(self, checkpoints: Checkpoints) -> int:
        """Everything before the first step, whose number it returns.  Raises ValueError on all ranks."""
        self.open_data()
        self.mesh = Mesh.make(self.config.mesh.fit(self.world.world_size), self.world.device.type)
        total, *_ = self.config.plan_batch(self.mesh.shape)
        self.config = replace(self.config, train=replace(self.config.train, global_batch=total))
        self.complete_config()
        found, source, resume = None, checkpoints, self.options.resume
        if resume:
            folder = Path(resume) / "checkpoints"
            source = (
                checkpoints
                if Path(resume) == self.out
                else Checkpoints(folder, self.world, report=self.print_on_main_rank)
            )
            found = source.newest()
            if found:
                ringx.launch.decide(self.world, lambda: self._expect_same(found[1]))
            held = ringx.launch.decide(self.world, lambda: any(folder.glob("step-????????")))
            if not found and (held or Path(resume) != self.out):
                raise ValueError(
                    f"--resume {resume}: there is no checkpoint in it that can be used; begin again with another --out."
                )
        if self.is_main_rank:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            self.write_extra_files()
        self.print_on_main_rank(self.config.to_yaml() + self.mesh.shape.describe())
        self.print_on_main_rank(self.describe())
        self.engine = self.build_engine(weights=not found)
        if not found:
            if resume:
                self.print_on_main_rank(f"{resume} holds no checkpoint yet: starting at step 0")
            return 0
        path, about = found
        state = self.engine.state()
        source.load(path, state)
        self.engine.load(state)
        self.print_on_main_rank(f"resumed from {path}, after {about['step']} steps")
        return about["step"]

    def _expect_same(self, about: Record) -> None:
        """ValueError naming what a checkpoint's run had that this one has not."""
        if "data" not in about:
            raise ValueError(
                "--resume: the checkpoint holds weights alone, as convert.py writes; begin from them with --init."
            )
        then, now = about["config"], self.config.to_dict()
        for part, k, why in self.must_match:
            if (was := then.get(part, {}).get(k)) != now[part][k]:
                raise ValueError(
                    f"--resume: the checkpoint's run has {k} {was}, here it is {now[part][k]}: {why}; give "
                    f"--{k.replace('_', '-')} {was}, or start a new run with another --out."
                )
        for k, value in now["model"].items():
            if then["model"].get(k) != value:
                raise ValueError(
                    f"--resume: the checkpoint is of another model: its {k} is {then['model'].get(k)}, here {value}."
                )
        if about["data"] != self.data_sha256():
            source = self.data_metadata()["source"]
            raise ValueError(
                f"--resume: the checkpoint's run read other data than {source}; name the same with --data."
            )

    def _train(self, checkpoints: Checkpoints, watch: Watch, first: int) -> int:
        config: RunConfig = self.config
        c, as_dict, data = config.train, config.to_dict(), self.data_sha256()
        saved = first

        def save(step: int) -> None:
            nonlocal saved
            if step > saved:
                checkpoints.save(
                    step, self.engine.state(), {"step": step, "config": as_dict, "data": data}
                )
                saved = step

        def before_step(step: int) -> None:
            if step == c.steps or (c.save_every and step % c.save_every == 0):
                save(step)
            try:
                watch.barrier_or_stop(self.world)
            except Stopped:
                save(step)
                raise

        records: list[Record] = []
        if self.is_main_rank:
            world = self.world
            launch = {
                "world": world.world_size,
                "launcher": world.launcher,
                "backend": world.backend,
                "device": str(world.device),
            }
            header = {
                "config": as_dict,
                "launch": launch,
                "data": self.data_metadata(),
                "loss_unit": self.loss_unit,
            }
            write_header(self.out, header, start_step=first)
        job, folder = self.options, self.out if self.is_main_rank else None
        log = Metrics(
            folder, start_step=first, tensorboard=job.tensorboard, wandb=job.wandb, config=as_dict
        )
        with log, progress(c.steps, first, config.name, is_main_rank=self.is_main_rank) as show:

            def on_step(record: Record) -> None:
                records.append(record)
                log.write(record)
                show(record)

            try:
                self.train_steps(first, on_step, before_step)
                stopped = False
            except Stopped:
                stopped = saved < c.steps
            except FloatingPointError as e:  # on all ranks
                if self.is_main_rank:
                    print(f"{self.prog}: error: {e}", file=sys.stderr, flush=True)
                return 1
        checkpoints.finish()
        if stopped:
            self.print_on_main_rank(
                f"stopped by {watch.stop_signal or 'another rank'} after {saved} steps, all saved; go on with --resume {self.out}"
            )
            return AGAIN if saved > first else 1
        if records:
            rates = sorted(r["tokens_per_s"] for r in records)
            self.print_on_main_rank(
                f"{config.name}: steps {first} to {c.steps - 1} of {self.describe_step()}, {c.algorithm} on {self.world.world_size} "
                f"rank(s), {c.dtype}: loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}, "
                f"{rates[len(rates) // 2]:,.0f} tokens/s; in {self.out}"
            )
        else:
            self.print_on_main_rank(
                f"{config.name}: all {c.steps} steps were done already; in {self.out}"
            )
        return 0
