"""Checkpoints of a training run: written while it runs, complete or absent, for any mesh.

    with Checkpoints(folder, world, keep=3) as checkpoints:
        existing = checkpoints.newest()
        if existing:
            path, metadata = existing
            checkpoints.load(path, state)               # in place; then set_state_dict(...)
        ...
        checkpoints.save(step, state, metadata)         # returns once the state has been copied
        ...
    # the last save has ended here, or its error was raised

A checkpoint is a folder `step-00000010`:

    __0_0.distcp, ..., .metadata    the state, by torch.distributed.checkpoint: each rank writes its
                                    own shards; one rank writes what several hold alike
    about.json                      the caller's metadata
    complete.json                   size and CRC-32 of every other file

It is written as `step-00000010.partial` and renamed when all files of all ranks are on disk.  A run
that is killed leaves a `.partial`, which nobody reads and the next save removes.  The same step
saved again replaces the old one: what a resumed run computes now is what it goes on from, and the
old one may be the damaged one that it did not resume from.  For the moment between two renames the
old one is `step-00000010.old`; it counts as a checkpoint too.

``ringx.files.write_folder`` does not serve here: it writes the folder of one process where none is.
This folder is written by all ranks, may replace an older one, and what a killed run left is no
error.

Memory: `save` copies what this rank holds (its shards; everything, where ranks are replicas) to CPU
memory once, on the caller's thread; the copy lives until it is written.  Checksums are taken of the
bytes as they are written; nothing is read back.

One run writes to a folder at a time, and all its ranks see that folder.  Loading unpickles: load
only what you trust.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future

from ringx import launch

MANIFEST = "complete.json"
ABOUT = "about.json"
NEEDED = (ABOUT, ".metadata")  # without these it is no checkpoint, whatever its manifest says
NAME = re.compile(r"step-(\d{8,})(\.old)?")
PARTIAL = re.compile(r"step-\d{8,}\.partial")
EXIT_WAIT = 30.0  # seconds that a run which failed waits for a save under way
CHUNK = 8 * 2**20  # bytes read at a time
NAMED = 3  # faults that an error names

# A process without peers is intended here.  A filter for the time of a call only would not be safe
# beside other threads.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


class Checkpoints:
    """The checkpoints in `folder`.

    All ranks make one, and call each of its methods, in the same order.

    Args:
        folder: where they are, or will be; made when the first is saved.
        world: of ``ringx.launch.init``; None is a process without peers.
        keep: how many to keep, the newest; older ones are deleted once a new one is in place.
            0 keeps all.
        report: called on rank 0 with one line about a checkpoint that cannot be used, or a folder
            that cannot be deleted.
        timeout: seconds that ranks wait for each other while they write or load: more than the
            slowest needs for its share.

    Raises:
        ValueError: `keep` is no number of checkpoints."""

    def __init__(
        self,
        folder: "str | Path",
        world: launch.World | None = None,
        *,
        keep: int = 3,
        report: Callable[[str], None] = print,
        timeout: float = 1800.0,
    ):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise ValueError(f"keep={keep!r} must be a number of checkpoints, or 0 to keep all.")
        self._folder = Path(folder)
        self._world = world
        self._keep = keep
        self._report = report
        self._rank, self._world_size = (world.rank, world.world_size) if world else (0, 1)
        # A group of its own: the background's messages must not mix with those of training, and
        # must not need the GPU.
        self._group: dist.ProcessGroup | None = None
        if self._world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: RuntimeError | None = None
        self._damaged: set[Path] = set()  # seen by newest(): these do not count as kept

    def save(self, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Begins to save.  Waits first for the save before it.

        Returns when `state` has been copied to CPU memory: then its tensors may change.

        Args:
            step: which, from 0.
            state: nested dicts of tensors, DTensors and picklable values, with the same keys on
                every rank (``get_state_dict`` gives such).  What is no DTensor must be the same on
                every rank: one of them writes it.
            metadata: anything that JSON can hold; ``newest`` and ``read_metadata`` return it.
                Rank 0's counts.

        Raises:
            RuntimeError: the save *before* this one failed, on some rank; this one was not begun.
            ValueError: `step` is no step, or JSON cannot hold `metadata`."""
        self.finish()
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step={step!r} must be an integer from 0.")
        try:
            text = json.dumps(metadata, indent=1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"about: JSON cannot hold it ({error}); pass dicts, lists, strings, numbers, "
                "booleans and None."
            ) from error
        # Not async_save: with torch's file writer, its copy leaves scalar DTensors shared with
        # training and copies the others twice.
        # A daemon: a process that ends because of an error must not wait for its peers.
        self._thread = threading.Thread(
            target=self._write, args=(step, _copied(state), text), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way.

        Raises:
            RuntimeError: it failed on some rank (raised on all ranks, once); names the folder and
                the cause.  Earlier checkpoints are as they were."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """``finish``."""
        self.finish()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Finishes.  After an error it waits 30 s at most, since peers may have died.

        What is not complete then is lost."""
        if kind is None:
            self.close()
        elif self._thread is not None:
            self._thread.join(EXIT_WAIT)
            # The error that ends the block is raised; that of the save is only reported.
            if self._error is not None and self._rank == 0:
                self._report(str(self._error))

    def newest(self) -> tuple[Path, Any] | None:
        """(path, metadata) of the newest checkpoint whose files are all as they were written.

        None if there is none.  Ones that are damaged are reported and passed over.

        The same on all ranks; each reads every N-th file of a checkpoint, once."""
        self.finish()
        for path in launch.decide(self._world, self._present):
            fault = self._fault_in(path)
            if fault is None:
                return path, launch.decide(self._world, partial(read_metadata, path))
            self._damaged.add(path)
            if self._rank == 0:
                self._report(f"checkpoint {path} is damaged and passed over: {fault}.")
        return None

    def require_complete(self, path: "str | Path") -> Any:
        """The metadata of the checkpoint at `path`, whose files are read as ``newest`` does.

        Raises ValueError on all ranks if it is damaged."""
        self.finish()
        fault = self._fault_in(Path(path))
        if fault:
            raise ValueError(f"checkpoint {path} is damaged: {fault}; take another.")
        return launch.decide(self._world, partial(read_metadata, path))

    def _fault_in(self, path: Path) -> str | None:
        """The first fault of a checkpoint; the same on all ranks."""
        files, manifest_fault = launch.decide(self._world, partial(_manifest, path))
        local_fault = None
        for name in sorted(files)[self._rank :: self._world_size]:
            local_fault = _fault(path / name, files[name])
            if local_fault:
                break
        faults = [local_fault] * self._world_size
        if self._group is not None:
            dist.all_gather_object(faults, local_fault, group=self._group)
        return manifest_fault or next((fault for fault in faults if fault), None)

    def load(self, path: "str | Path", state: dict[str, Any]) -> None:
        """Fills `state` from the checkpoint at `path`.

        `state` is built as the one that was saved: tensors and DTensors are filled in place, other
        values replaced.  Mesh, placements and number of ranks may be others than when it was saved.

        Raises:
            ValueError: keys, shapes or dtypes differ from the checkpoint's; names the first few;
                `state` is as it was.
            RuntimeError: it cannot be read."""
        self.finish()
        reader = dcp.FileSystemReader(path)
        try:
            dcp.load(
                state,
                storage_reader=reader,
                planner=_Same(),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            rank, cause = _first(error)
            if isinstance(cause, _Differs):
                raise ValueError(f"checkpoint {path} does not fit: {cause}") from None
            raise RuntimeError(
                f"checkpoint {path} cannot be read, says rank {rank}: {_one_line(cause)}"
            ) from error

    # ---- in the background

    def _write(self, step: int, state: dict[str, Any], metadata: str) -> None:
        partial_folder = self._folder / f"step-{step:08d}.partial"

        def commit(files: dict[str, tuple[int, int]]) -> None:
            self._commit(partial_folder, files, metadata)

        writer = _Writer(partial_folder, self._prepare, commit)
        try:
            # Each part of it that fails on one rank raises on all.
            dcp.save(
                state,
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            self._fail(step, error, *_first(error))
        except Exception as error:  # noqa: BLE001 - finish() raises it
            self._fail(step, error, self._rank, error)

    def _fail(self, step: int, error: BaseException, rank: int, cause: BaseException) -> None:
        self._error = RuntimeError(
            f"the checkpoint of step {step} could not be written to {self._folder}: rank {rank}: "
            f"{_one_line(cause)}. Checkpoints before it are as they were."
        )
        self._error.__cause__ = error

    def _prepare(self) -> None:
        """On rank 0, before anything is written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if PARTIAL.fullmatch(path.name):
                self._delete(path)

    def _commit(
        self, partial_folder: Path, files: dict[str, tuple[int, int]], metadata: str
    ) -> None:
        """Puts a checkpoint in place: on rank 0, after all ranks have written their files.

        files: {name: (bytes, CRC-32)}."""
        for name, (size, _) in files.items():
            file = partial_folder / name
            seen = file.stat().st_size if file.exists() else None
            if seen != size:
                raise OSError(
                    f"{name} has {seen} of the {size} bytes written, seen from rank 0; do all "
                    "ranks see this folder?"
                )
        files[ABOUT] = _put(partial_folder / ABOUT, metadata)
        listed = {
            name: {"bytes": size, "crc32": f"{crc:08x}"}
            for name, (size, crc) in sorted(files.items())
        }
        _put(partial_folder / MANIFEST, json.dumps({"files": listed}, indent=1))
        _sync(partial_folder)
        path = partial_folder.with_suffix("")
        old = partial_folder.with_suffix(".old")
        if path.exists():
            if old.exists():
                self._delete(old)
            path.rename(old)
        partial_folder.rename(path)
        _sync(self._folder)
        self._damaged.discard(path)
        self._prune(path)

    def _prune(self, new: Path) -> None:
        """Deletes the checkpoints that are not kept any more."""
        present = self._present()
        # Those with a higher step belong to a run that was given up, or are damaged: they stay.
        older = present[present.index(new) + 1 :]
        useful = [
            path for path in older if path.suffix != ".old" or not path.with_suffix("").exists()
        ]
        if self._keep:
            undamaged = [path for path in useful if path not in self._damaged]
            useful = undamaged[: self._keep - 1]
        for path in older:
            if path not in useful:
                self._delete(path)

    def _present(self) -> list[Path]:
        """Checkpoints in the folder, complete by their name; newest first."""
        present = []
        try:
            for path in self._folder.iterdir():
                match = NAME.fullmatch(path.name)
                if match:
                    is_old = bool(match[2])
                    present.append((int(match[1]), not is_old, path))
        except FileNotFoundError:
            return []
        return [path for _, _, path in sorted(present, reverse=True)]

    def _delete(self, path: Path) -> None:
        """Reports what it cannot delete: no reason to end a run, and the next save tries again."""
        try:
            if path.suffix != ".partial":  # half deleted, it must not look like a checkpoint
                path = path.rename(path.with_suffix(".partial"))
            shutil.rmtree(path)
        except OSError as error:
            self._report(f"{path} could not be deleted: {_one_line(error)}")


def read_metadata(path: "str | Path") -> Any:
    """The metadata with which the checkpoint at `path` was saved.

    Raises:
        ValueError: there is none, or it is garbage."""
    try:
        return json.loads((Path(path) / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path={str(path)!r} is no checkpoint ({_one_line(error)}); name a folder "
            "step-NNNNNNNN."
        ) from error


# ---- copying


def _copied(state: Any) -> Any:
    """The same with all tensors copied to the CPU; DTensors keep their mesh and placements."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)  # waits for the GPU's work on it
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_copied, state))
    return copy.deepcopy(state)


# ---- writing


class _SummedFile(io.BufferedWriter):
    """A new file that counts size and CRC-32 of what is written; on disk when it is closed."""

    size = crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.size += len(view)
        self.crc = zlib.crc32(view, self.crc)
        return super().write(view)

    def close(self) -> None:
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


class _SummedFileSystem(FileSystem):
    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}  # name -> bytes, CRC-32

    @contextlib.contextmanager
    def create_stream(self, path: "str | os.PathLike[str]", mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with _SummedFile(io.FileIO(path, "wb")) as stream:
            yield stream
        self.files[Path(path).name] = (stream.size, stream.crc)

    def rename(self, path: "str | os.PathLike[str]", new_path: "str | os.PathLike[str]") -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, with checksums, and with what rank 0 does before and after.

    The checksums travel with what the ranks report to rank 0 anyway."""

    def __init__(
        self,
        path: Path,
        prepare: Callable[[], None],
        commit: Callable[[dict[str, tuple[int, int]]], None],
    ):
        # torch's own fsync of .metadata comes before its flush: _SummedFile does it.  Nothing is
        # copied ahead: all is on the CPU.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)
        self.fs = self._summed = _SummedFileSystem()
        self._prepare = prepare
        self._commit = commit

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._prepare()

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan  # no folder yet: rank 0 may still be deleting what was there

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            self.fs.mkdir(self.path)
            written = super().write_data(plan, planner).wait()
        except Exception as error:  # noqa: BLE001 - raised on all ranks
            # torch.save raises an error of its own where the disk is full.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            # The error goes to rank 0: other types may not survive pickling.
            raise RuntimeError(_one_line(error)) from None
        done: Future = Future()
        done.set_result((written, self._summed.files))
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, [written for written, _ in results])
        files = self._summed.files  # rank 0's own, .metadata among them
        for _, files_of_rank in results:
            files |= files_of_rank
        self._commit(files)


def _put(path: Path, text: str) -> tuple[int, int]:
    with _SummedFile(io.FileIO(path, "wb")) as file:
        file.write(text.encode())
    return file.size, file.crc


def _sync(folder: Path) -> None:
    """Flushes the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; a rename is whole there, too
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading


def _manifest(path: Path) -> tuple[dict[str, tuple[int, int]], str | None]:
    """({name: (bytes, CRC-32)}, the fault of the manifest)."""
    try:
        listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {
            str(name): (int(entry["bytes"]), int(entry["crc32"], 16))
            for name, entry in listed.items()
        }
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST} cannot be read ({_one_line(error)})"
    for name in NEEDED:
        if name not in files:
            return files, f"{MANIFEST} does not list {name}"
    return files, None


def _fault(path: Path, written: tuple[int, int]) -> str | None:
    """The fault of a file that was `written` as (bytes, CRC-32)."""
    size = crc = 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
                crc = zlib.crc32(chunk, crc)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({_one_line(error)})"
    written_size, written_crc = written
    if size != written_size:
        return f"{path.name} has {size} bytes, {written_size} were written"
    if crc != written_crc:
        return f"{path.name} has other bytes than were written (CRC-32)"
    return None


class _Differs(ValueError):
    """A state is not built as the one that was saved."""


class _Same(DefaultLoadPlanner):
    """Refuses, before anything is read, a state that is not built as the one that was saved.

    torch's own planner ignores keys that only the checkpoint has, and converts dtypes."""

    def create_local_plan(self) -> Any:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        wanted = {key: _kind(value) for key, value in self.state_dict.items()}
        stored = {key: _kind(value) for key, value in saved.items()}
        faults = _differences(wanted, stored)
        if faults:
            more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
            raise _Differs(
                f"{'; '.join(faults[:NAMED])}{more}. Load it into the model and optimizer that it "
                "was saved from."
            )
        return super().create_local_plan()


def _differences(wanted: dict[str, str], stored: dict[str, str]) -> list[str]:
    """One line about each key of a state ({key: kind}) that is not stored as it is wanted."""
    faults = [f"{key} is not in it" for key in wanted if key not in stored]
    faults += [f"{key} is in it, but not asked for" for key in stored if key not in wanted]
    for key, kind in wanted.items():
        if key in stored and stored[key] != kind:
            faults.append(f"{key} is {stored[key]} in it, not {kind}")
    return faults


def _kind(value: Any) -> str:
    """The dtype and shape of a tensor, or of the metadata of one."""
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "no tensor"


# ---- errors


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    """The lowest rank that failed, and why."""
    rank = min(error.failures)
    cause, _ = error.failures[rank]
    return rank, cause


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
