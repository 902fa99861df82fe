"""A training run as each rank sees it, whatever is trained: reading, resuming, saving, logging."""

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
    """One rank's part of a run.  An app adds what its data and its model are."""

    prog: str  # of messages
    loss_unit: str
    # What a resumed run must have in common with its checkpoint's:
    # (part of the configuration, field, what else would happen)
    must_match: tuple[tuple[str, str, str], ...]

    config: Any  # global_batch is filled in once the mesh is known
    mesh: Mesh
    engine: Engine

    def __init__(self, world: World, options: RunOptions):
        self.world = world
        self.options = options
        self.config = options.config
        self.out = Path(options.out)
        self.is_main_rank = world.rank == 0  # it alone writes and prints

    def print_on_main_rank(self, text: str) -> None:
        if self.is_main_rank:
            print(text, flush=True)

    # ---- what an app defines

    @abc.abstractmethod
    def open_data(self) -> None:
        """Opens the data.  Raises ValueError on all ranks alike (``ringx.launch.decide``)."""

    @abc.abstractmethod
    def data_sha256(self) -> str:
        """The digest of the data that ``open_data`` has opened."""

    @abc.abstractmethod
    def data_metadata(self) -> dict[str, Any]:
        """What run.json holds of the data; "source" is its name for people."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: the data and the model."""

    @abc.abstractmethod
    def build_engine(self, weights: bool) -> Engine:
        """The engine; weights: with first weights (otherwise a checkpoint has them)."""

    @abc.abstractmethod
    def train_steps(
        self, first: int, on_step: Callable[[Record], None], before_step: Callable[[int], None]
    ) -> None:
        """``run_steps`` of this run."""

    @abc.abstractmethod
    def describe_step(self) -> str:
        """The samples of a step, such as "4 x 512 tokens"."""

    def complete_config(self) -> None:  # noqa: B027 - some apps have nothing to complete
        """Fills in what of `config` follows from the data and the global batch.

        Called after ``open_data``, on all ranks."""

    def write_extra_files(self) -> None:  # noqa: B027 - some apps have nothing to add
        """Writes more files that belong to the run into `out`; called on rank 0."""

    # ---- the run

    def main(self) -> int:
        """Runs it; returns the process's exit status."""
        ringx.launch.announce(self.world)
        with Watch() as watch, self._own_checkpoints() as checkpoints:
            try:
                first = self._prepare(checkpoints)
            except ValueError as e:  # on all ranks: a mistake that only the ranks can find
                self._print_error(e)
                return 2
            return self._train(checkpoints, watch, first)

    def _own_checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.out / "checkpoints",
            self.world,
            keep=self.config.train.keep,
            report=self.print_on_main_rank,
        )

    def _print_error(self, error: Exception) -> None:
        if self.is_main_rank:
            print(f"{self.prog}: error: {error}", file=sys.stderr, flush=True)

    # ---- before the first step

    def _prepare(self, checkpoints: Checkpoints) -> int:
        """Everything before the first step, whose number it returns.

        Raises ValueError on all ranks."""
        self.open_data()
        self.mesh = Mesh.make(self.config.mesh.fit(self.world.world_size), self.world.device.type)
        global_batch, *_ = self.config.plan_batch(self.mesh.shape)
        train = replace(self.config.train, global_batch=global_batch)
        self.config = replace(self.config, train=train)
        self.complete_config()
        source, existing = self._find_checkpoint(checkpoints)
        if self.is_main_rank:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            self.write_extra_files()
        self.print_on_main_rank(self.config.to_yaml() + self.mesh.shape.describe())
        self.print_on_main_rank(self.describe())
        self.engine = self.build_engine(weights=existing is None)
        if existing is None:
            if self.options.resume:
                self.print_on_main_rank(
                    f"{self.options.resume} holds no checkpoint yet: starting at step 0"
                )
            return 0
        path, metadata = existing
        state = self.engine.state()
        source.load(path, state)
        self.engine.load(state)
        self.print_on_main_rank(f"resumed from {path}, after {metadata['step']} steps")
        return metadata["step"]

    def _find_checkpoint(
        self, checkpoints: Checkpoints
    ) -> tuple[Checkpoints, tuple[Path, Record] | None]:
        """(the folder's checkpoints, (path, metadata) of the one to go on from) of a resumed run.

        None: the run begins at step 0."""
        if not self.options.resume:
            return checkpoints, None
        run = Path(self.options.resume)
        folder = run / "checkpoints"
        in_place = run == self.out
        source = checkpoints
        if not in_place:
            source = Checkpoints(folder, self.world, report=self.print_on_main_rank)
        existing = source.newest()
        if existing is not None:
            _, metadata = existing
            ringx.launch.decide(self.world, lambda: self._require_same_run(metadata))
        has_folders = ringx.launch.decide(self.world, lambda: any(folder.glob("step-????????")))
        if existing is None and (has_folders or not in_place):
            raise ValueError(
                f"--resume {self.options.resume}: there is no checkpoint in it that can be used; "
                "begin again with another --out."
            )
        return source, existing

    def _require_same_run(self, metadata: Record) -> None:
        """ValueError naming what the checkpoint's run had that this one has not."""
        if "data" not in metadata:
            raise ValueError(
                "--resume: the checkpoint holds weights alone, as convert.py writes; begin from "
                "them with --init."
            )
        saved = metadata["config"]
        current = self.config.to_dict()
        for part, name, reason in self.must_match:
            before = saved.get(part, {}).get(name)
            now = current[part][name]
            if before != now:
                raise ValueError(
                    f"--resume: the checkpoint's run has {name} {before}, here it is {now}: "
                    f"{reason}; give --{name.replace('_', '-')} {before}, or start a new run with "
                    "another --out."
                )
        for name, now in current["model"].items():
            before = saved["model"].get(name)
            if before != now:
                raise ValueError(
                    f"--resume: the checkpoint is of another model: its {name} is {before}, "
                    f"here {now}."
                )
        if metadata["data"] != self.data_sha256():
            source = self.data_metadata()["source"]
            raise ValueError(
                f"--resume: the checkpoint's run read other data than {source}; name the same "
                "with --data."
            )

    # ---- the steps

    def _train(self, checkpoints: Checkpoints, watch: Watch, first: int) -> int:
        """Runs the steps from `first` on; returns the process's exit status."""
        train = self.config.train
        saver = _Saver(checkpoints, self.engine, self.config, self.data_sha256(), saved=first)
        records: list[Record] = []

        def before_step(step: int) -> None:
            if step == train.steps or (train.save_every and step % train.save_every == 0):
                saver.save(step)
            try:
                watch.barrier_or_stop(self.world)
            except Stopped:
                saver.save(step)
                raise

        if self.is_main_rank:
            write_header(self.out, self._header(), start_step=first)
        stopped = False
        bar = progress(train.steps, first, self.config.name, is_main_rank=self.is_main_rank)
        with self._metrics(first) as metrics, bar as show:

            def on_step(record: Record) -> None:
                records.append(record)
                metrics.write(record)
                show(record)

            try:
                self.train_steps(first, on_step, before_step)
            except Stopped:
                stopped = saver.saved < train.steps
            except FloatingPointError as e:  # on all ranks
                self._print_error(e)
                return 1
        checkpoints.finish()
        if stopped:
            self.print_on_main_rank(
                f"stopped by {watch.stop_signal or 'another rank'} after {saver.saved} steps, "
                f"all saved; go on with --resume {self.out}"
            )
            return AGAIN if saver.saved > first else 1
        self.print_on_main_rank(self._summary(first, records))
        return 0

    def _header(self) -> dict[str, Any]:
        """What run.json holds of this session."""
        launch = {
            "world": self.world.world_size,
            "launcher": self.world.launcher,
            "backend": self.world.backend,
            "device": str(self.world.device),
        }
        return {
            "config": self.config.to_dict(),
            "launch": launch,
            "data": self.data_metadata(),
            "loss_unit": self.loss_unit,
        }

    def _metrics(self, first: int) -> Metrics:
        return Metrics(
            self.out if self.is_main_rank else None,
            start_step=first,
            tensorboard=self.options.tensorboard,
            wandb=self.options.wandb,
            config=self.config.to_dict(),
        )

    def _summary(self, first: int, records: list[Record]) -> str:
        """One line about a run that has done all its steps."""
        name = self.config.name
        train = self.config.train
        if not records:
            return f"{name}: all {train.steps} steps were done already; in {self.out}"
        rates = sorted(record["tokens_per_s"] for record in records)
        median = rates[len(rates) // 2]
        return (
            f"{name}: steps {first} to {train.steps - 1} of {self.describe_step()}, "
            f"{train.algorithm} on {self.world.world_size} rank(s), {train.dtype}: "
            f"loss {records[0]['loss']:.4f} -> {records[-1]['loss']:.4f}, "
            f"{median:,.0f} tokens/s; in {self.out}"
        )


class _Saver:
    """Saves a run's checkpoints, each step at most once."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        config: RunConfig,
        data_sha256: str,
        saved: int,
    ):
        self.saved = saved  # the newest step of which there is a checkpoint (0: none is needed)
        self._checkpoints = checkpoints
        self._engine = engine
        self._config = config.to_dict()
        self._data_sha256 = data_sha256

    def save(self, step: int) -> None:
        """Saves the state before `step`, unless that has been done."""
        if step <= self.saved:
            return
        metadata = {"step": step, "config": self._config, "data": self._data_sha256}
        self._checkpoints.save(step, self._engine.state(), metadata)
        self.saved = step
