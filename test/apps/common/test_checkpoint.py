"""Checkpoints: equal on any mesh, complete or absent, damaged ones passed over.

Errors are raised on all ranks.

python -m pytest test/apps/common/test_checkpoint.py
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.paths import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apps.common import checkpoint
from apps.common.checkpoint import Checkpoints, read_metadata
from ringx import launch

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled"
)  # pytest undoes the filter of checkpoint.py


class Model(nn.Module):
    """Sizes that ranks cannot share evenly, and a buffer, which FSDP leaves alone."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.up, self.down = nn.LayerNorm(13), nn.Linear(13, 20), nn.Linear(20, 13)
        self.register_buffer("seen", torch.tensor(seed))

    def forward(self, x):
        return self.down(self.up(self.norm(x)).relu())


def make(seed, mesh=None):
    """(model, AdamW), sharded over the mesh's "fsdp" and "tp"."""
    model = Model(seed)
    if mesh is not None and "tp" in mesh.mesh_dim_names:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if mesh is not None:
        fully_shard(model, mesh=mesh["fsdp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed, foreach=False)
    return model, optimizer


def train(model, optimizer, steps=2):
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(4, 13)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model, optimizer, n=0):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "n": n, "scalar": torch.tensor(float(n))}


def leaves(nested, path=""):
    """{path: value} of nested dicts."""
    if not isinstance(nested, dict):
        return {path: nested}
    values = {}
    for key, value in nested.items():
        values.update(leaves(value, f"{path}/{key}"))
    return values


def full_value(value):
    """A copy of a tensor, whole; any other value as it is.  Collective."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value


def whole(state):
    """{path: the full tensor or value}, copied.  Collective."""
    return {path: full_value(value) for path, value in leaves(state).items()}


def spoil(state):
    """Overwrites this rank's part of all tensors."""
    for value in leaves(state).values():
        if isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            local.detach().fill_(77)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, (key, value, b[key])


def names(folder, world=None):
    """What is in a folder; the ranks of `world` look at the same time."""
    if world is not None:
        dist.barrier()
    existing = sorted(path.name for path in Path(folder).iterdir())
    if world is not None:
        dist.barrier()
    return existing


def message(call, kind=RuntimeError):
    """What `call` raises, and that it is of this kind and one line."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


# ---- on several ranks


def four_ranks(world, folder):
    """Saves a model on 2 x 2 ranks, and what can go wrong while saving.

    Returns:
        What step 10 in `folder`/a holds."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    reports = []
    expected = saves_while_training_goes_on(world, mesh, Path(folder) / "a", reports)
    big = {str(rank): torch.ones(1000) for rank in range(world.world_size)}  # each rank writes one
    b = Path(folder) / "b"
    with Checkpoints(b, world, keep=2, report=reports.append) as checkpoints:
        keeps_the_last_two(world, mesh, b, checkpoints)
        tells_all_ranks_of_a_full_disk(world, b, checkpoints, big)
        refuses_other_states(world, b, checkpoints, big)

    # a folder that cannot be made
    with Checkpoints(b / "step-00000060" / "about.json" / "deeper", world) as checkpoints:
        checkpoints.save(1, big, {})
        assert "rank 0: NotADirectoryError" in message(checkpoints.finish)
    assert not reports
    return expected


def saves_while_training_goes_on(world, mesh, folder, reports):
    """Step 10 holds what the model was when it was saved, and another model is filled with it."""
    model, optimizer = make(1, mesh)
    train(model, optimizer)
    state = state_of(model, optimizer, n=3)
    expected = whole(state)
    metadata = {"step": 10, "tokens": "é"}
    with Checkpoints(folder, world, report=reports.append) as checkpoints:
        assert checkpoints.newest() is None
        checkpoints.save(10, state, metadata)
        spoil(state)  # training goes on
        assert checkpoints.newest() == (folder / "step-00000010", metadata)
        other = state_of(*make(2, mesh))
        checkpoints.load(folder / "step-00000010", other)
        assert_equal(whole(other), expected)
    return expected


def keeps_the_last_two(world, mesh, folder, checkpoints):
    """The same step again replaces the first; a DTensor without dimensions is copied, too."""
    state = {"x": distribute_tensor(torch.tensor(5.0), mesh, [Replicate()] * 2), "n": 0}
    for step, n in [(10, 0), (20, 1), (30, 2), (30, 3)]:
        checkpoints.save(step, {**state, "n": n}, {"n": n})
    state["x"].to_local().fill_(77)
    assert checkpoints.newest() == (folder / "step-00000030", {"n": 3})
    assert names(folder, world) == ["step-00000020", "step-00000030"]
    checkpoints.load(folder / "step-00000030", state)
    assert state["n"] == 3 and state["x"].full_tensor() == 5


def tells_all_ranks_of_a_full_disk(world, folder, checkpoints, big):
    """One rank's disk is full: all are told, at the next call, once; earlier ones stay."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))
    began = time.monotonic()
    checkpoints.save(40, big, {})
    error = message(lambda: checkpoints.save(50, big, {}))
    assert error.startswith(
        f"the checkpoint of step 40 could not be written to {folder}: rank 2: OSError: [Errno 27]"
    ), error
    assert time.monotonic() - began < 10
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert checkpoints.newest() == (folder / "step-00000030", {"n": 3})
    assert names(folder, world) == ["step-00000020", "step-00000030", "step-00000040.partial"]
    checkpoints.save(60, big, {})
    checkpoints.finish()
    assert names(folder, world) == ["step-00000030", "step-00000060"]


def refuses_other_states(world, folder, checkpoints, big):
    """One of another shape, one that not all ranks ask for, a checkpoint that is not there."""
    path = folder / "step-00000060"
    other = {**big, "1": torch.ones(999), "4": 0}
    error = message(lambda: checkpoints.load(path, other), ValueError)
    assert "4 is not in it; 1 is torch.float32 [1000] in it, not torch.float32 [999]" in error
    local_state = big if world.rank != 3 else {"0": torch.ones(1000)}
    error = message(lambda: checkpoints.load(path, local_state), ValueError)
    assert "1 is in it, but not asked for" in error
    error = message(lambda: checkpoints.load(folder / "step-00000070", big))
    assert "step-00000070 cannot be read" in error


def two_ranks(world, folder, expected):
    """Loads what four saved, as FSDP and as replicas do.

    Passes damaged ones over, and leaves when its peer does not come."""
    a, c = Path(folder) / "a", Path(folder) / "c"
    with Checkpoints(a, world) as checkpoints:
        path, _ = checkpoints.newest()
        for mesh in (init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)), None):
            model, optimizer = make(2, mesh)
            state = state_of(model, optimizer)
            checkpoints.load(path, state)
            assert_equal(whole(state), expected)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            assert_equal(whole(state_of(model, optimizer, n=3)), expected)

    passes_damaged_ones_over(world, c, state)
    leaves_without_its_peer(world, c, state)


def passes_damaged_ones_over(world, folder, state):
    """Either rank finds one of two damaged files; rank 0 reports both."""
    reports = []
    with Checkpoints(folder, world, keep=0, report=reports.append) as checkpoints:
        for step in range(4):
            state["n"] = step
            checkpoints.save(step, state, {"n": step})
        checkpoints.finish()
        files = set(names(folder / "step-00000003", world))
        assert {"__0_0.distcp", "__1_0.distcp"} <= files  # replicas share the writing
        if world.rank == 0:
            flip(folder / "step-00000003" / "__0_0.distcp")
            flip(folder / "step-00000002" / "__1_0.distcp")
        dist.barrier()
        assert checkpoints.newest() == (folder / "step-00000001", {"n": 1})
    faults = [line for line in reports if "has other bytes than were written" in line]
    assert len(reports) == len(faults) == (2 if world.rank == 0 else 0), reports


def leaves_without_its_peer(world, folder, state):
    """Rank 0 fails while it saves, and rank 1 never does: rank 0 waits for a second only."""
    checkpoint.EXIT_WAIT = 1.0
    began = time.monotonic()
    if world.rank == 0:
        with (
            contextlib.suppress(KeyError),
            Checkpoints(folder, None) as lone,
            Checkpoints(folder, world) as checkpoints,
        ):
            checkpoints.save(4, state, {})
            raise KeyError
        assert lone.newest() is not None
        assert 1 <= time.monotonic() - began < 5
    else:
        Checkpoints(folder, world)


def a_peer_dies(world, folder):
    """While rank 0 waits for it to write."""
    if world.rank == 1:
        checkpoint._Writer.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(RuntimeError), Checkpoints(folder, world) as c:
        c.save(1, {"x": torch.ones(3)}, {})
        (Path(folder) / "said").write_text(message(c.finish))
    time.sleep(60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, what its checkpoint holds), saved by a model on 2 x 2 ranks."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, launch.run(four_ranks, 4, str(folder), device="cpu")[0]


def test_four_ranks_save_and_two_load(saved):
    launch.run(two_ranks, 2, str(saved[0]), saved[1], device="cpu")


def test_a_plain_process_loads_what_four_ranks_saved(saved):
    folder, expected = saved
    state = state_of(*make(2))
    with Checkpoints(folder / "a") as c:
        path, about = c.newest()
        assert about == read_metadata(path) == {"step": 10, "tokens": "é"}
        c.load(path, state)
    assert_equal(whole(state), expected)


@pytest.mark.fast
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    straight, resumed = make(1), make(2)
    train(*straight)
    with Checkpoints(tmp_path) as c:
        c.save(2, state_of(*straight), {})
        train(*straight)
        state = state_of(*resumed)
        c.load(c.newest()[0], state)
    set_state_dict(*resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(*resumed)
    assert_equal(leaves(state_of(*resumed)), leaves(state_of(*straight)))


def test_a_rank_that_dies_while_it_saves_ends_the_others_wait(tmp_path):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of 2 was ended by SIGKILL"):
        launch.run(a_peer_dies, 2, str(tmp_path), device="cpu")
    assert time.monotonic() - began < 20
    assert f"step 1 could not be written to {tmp_path}" in (tmp_path / "said").read_text()


# ---- in this process


def flip(path):
    with path.open("r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "a byte flipped": (
        lambda p: flip(p / "__0_0.distcp"),
        "__0_0.distcp has other bytes than were written (CRC-32)",
    ),
    "truncated": (lambda p: os.truncate(p / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes, "),
    "no data": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no metadata": (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
    "garbage about": (lambda p: (p / "about.json").write_text("{"), "about.json has 1 bytes, "),
    "other about": (lambda p: edit(p / "about.json", "2", "3"), "about.json has other bytes"),
    "no manifest": (lambda p: (p / "complete.json").unlink(), "complete.json is missing"),
    "garbage manifest": (
        lambda p: (p / "complete.json").write_bytes(b"\x80"),
        "complete.json cannot be read (UnicodeDecodeError",
    ),
    "odd manifest": (
        lambda p: (p / "complete.json").write_text('{"files": 3}'),
        "complete.json cannot be read (AttributeError",
    ),
    "empty manifest": (
        lambda p: (p / "complete.json").write_text('{"files": {}}'),
        "complete.json does not list about.json",
    ),
}


def small(n):
    """A state of many kinds that says which it is."""
    return {
        "a": {"x": torch.full((50,), float(n))},
        "list": [torch.tensor(n), {"y": n}],
        "pair": (n, torch.tensor(n)),
        "n": n,
    }


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as c:
        for n in (1, 2):
            c.save(n, small(n), {"n": n})
    return folder


@pytest.mark.fast
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_one_is_named_and_passed_over(two_steps, tmp_path, what):
    damage, reason = DAMAGE[what]
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-00000002")
    said = []
    with Checkpoints(tmp_path, keep=1, report=said.append) as c:
        assert c.newest() == (tmp_path / "step-00000001", {"n": 1})
        assert len(said) == 1 and said[0].startswith(
            f"checkpoint {tmp_path}/step-00000002 is damaged and passed over: {reason}"
        )
        assert c.require_complete(tmp_path / "step-00000001") == {"n": 1}
        with pytest.raises(ValueError, match=f"step-00000002 is damaged: {re.escape(reason)}"):
            c.require_complete(tmp_path / "step-00000002")
        state = small(0)
        c.load(tmp_path / "step-00000001", state)
        assert_equal(leaves(state["a"]), leaves(small(1)["a"]))
        assert (state["list"], state["pair"], state["n"]) == (
            [torch.tensor(1), {"y": 1}],
            (1, torch.tensor(1)),
            1,
        )
        c.save(2, small(3), {"n": 3})  # redone
        assert c.newest() == (tmp_path / "step-00000002", {"n": 3})
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.fast
def test_damaged_ones_do_not_count_as_kept(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000007")
    flip(tmp_path / "step-00000002" / ".metadata")
    flip(tmp_path / "step-00000007" / ".metadata")
    with Checkpoints(tmp_path, keep=2, report=lambda line: None) as c:
        assert c.newest()[1] == {"n": 1}
        c.save(3, small(3), {})
        c.finish()
        assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000007"]
        c.save(8, small(3), {})
        c.finish()
        assert names(tmp_path) == ["step-00000003", "step-00000008"]


@pytest.mark.fast
def test_between_two_renames_the_old_one_counts(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.old")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    with Checkpoints(tmp_path, keep=2) as c:
        assert c.newest() == (tmp_path / "step-00000002.old", {"n": 2})
        c.save(3, small(3), {})
        c.finish()
        assert names(tmp_path) == ["step-00000002.old", "step-00000003"]
        c.save(2, small(4), {"n": 4})
        c.save(3, small(3), {})
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.fast
def test_what_remains_of_others_is_removed_and_strangers_stay(tmp_path):
    for name in ("step-00000001.partial", "step-00000009.partial", "step-9", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    said = []
    with Checkpoints(tmp_path, keep=1, report=said.append) as c:
        assert c.newest() is None
        c.save(5, small(5), {})
    assert names(tmp_path) == ["notes", "step-00000005", "step-9"] and not said


@pytest.mark.fast
def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """save() returns while the writer is held up.

    What training then does to the tensors is not in the file."""
    gate = threading.Event()
    write = checkpoint._Writer.write_data
    monkeypatch.setattr(
        checkpoint._Writer, "write_data", lambda *args: gate.wait(20) and write(*args)
    )
    views = torch.arange(10.0)
    state = {
        "x": torch.ones(5, requires_grad=True),
        "part": views[2:4],
        "list": [torch.ones(2)],
        "plain": {"p": [1], "set": {1}},
    }
    with Checkpoints(tmp_path) as c:
        c.save(1, state, {})
        with torch.no_grad():
            state["x"].fill_(7)
            views.fill_(7)
            state["list"][0].fill_(7)
            state["plain"]["p"][0] = 7
        state["plain"]["set"].add(7)
        assert names(tmp_path) == []
        gate.set()
        c.finish()
        c.load(tmp_path / "step-00000001", state)
    assert state["x"].tolist() == [1.0] * 5 and state["part"].tolist() == [2.0, 3.0]
    assert state["list"][0].tolist() == [1.0, 1.0] and state["plain"] == {"p": [1], "set": {1}}
    assert (tmp_path / "step-00000001" / "__0_0.distcp").stat().st_size < 10_000


@pytest.mark.fast
def test_everything_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order of writes, fsyncs and renames, as the system sees it."""
    events = []

    def fsync(fd, call=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        events.append(("sync", path.name, path.is_dir() or path.stat().st_size))
        call(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(
        Path,
        "rename",
        lambda a, b, call=Path.rename: (events.append(("rename", a.name, b.name)), call(a, b))[1],
    )
    with Checkpoints(tmp_path) as c:
        c.save(1, {"x": torch.ones(100_000)}, {})
    sizes = {
        name: (tmp_path / "step-00000001" / name).stat().st_size
        for name in names(tmp_path / "step-00000001")
    }
    assert events == [
        ("sync", "__0_0.distcp", sizes["__0_0.distcp"]),
        ("sync", ".metadata.tmp", sizes[".metadata"]),
        ("rename", ".metadata.tmp", ".metadata"),
        ("sync", "about.json", sizes["about.json"]),
        ("sync", "complete.json", sizes["complete.json"]),
        ("sync", "step-00000001.partial", True),
        ("rename", "step-00000001.partial", "step-00000001"),
        ("sync", tmp_path.name, True),
    ]


class StoppingCalls:
    """Stands in for the calls that change a folder for good, and stops at the one after `limit`.

    From then on nothing happens any more, as if the process were dead."""

    def __init__(self, limit):
        self.limit = limit
        self.calls = 0
        self.real = {"fsync": os.fsync, "rename": Path.rename, "rmtree": shutil.rmtree}

    def replace(self, patch):
        for owner, name in ((os, "fsync"), (Path, "rename"), (shutil, "rmtree")):
            patch.setattr(owner, name, self.replacement(name))

    def replacement(self, name):
        def call(*args):
            self.calls += 1
            if self.calls <= self.limit:
                return self.real[name](*args)
            if self.calls == self.limit + 1 and name == "rmtree":
                next(args[0].iterdir()).unlink()  # half done
            raise OSError("stopped")

        return call


def assert_none_is_half_deleted(folder, copy_folder):
    """All checkpoints of the folder are whole, not the newest only."""
    reports = []
    shutil.copytree(folder, copy_folder)
    checkpoints = Checkpoints(copy_folder, report=reports.append)
    while newest := checkpoints.newest():
        shutil.rmtree(newest[0])
    assert not reports
    shutil.rmtree(copy_folder)


def assert_last_are_kept(folder, keep):
    kept = names(folder)
    assert kept[-1] == "step-00000006" and not any(name.endswith(".partial") for name in kept)
    if keep:
        assert len(kept) == keep
    else:
        assert kept[-3:] == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_stopped_at_any_moment_there_is_a_whole_one(two_steps, tmp_path, monkeypatch, keep):
    """Step 2 is saved again, and interrupted before the first, second, ... change for good."""
    seen = set()
    for limit in range(100):
        folder = tmp_path / str(limit)
        shutil.copytree(two_steps, folder)
        stopping = StoppingCalls(limit)
        with monkeypatch.context() as patch:
            stopping.replace(patch)
            with (
                contextlib.suppress(RuntimeError),
                Checkpoints(folder, keep=keep, report=lambda line: None) as checkpoints,
            ):
                checkpoints.save(2, small(3), {"n": 3})
        reports = []
        with Checkpoints(folder, keep=keep, report=reports.append) as checkpoints:
            path, metadata = checkpoints.newest()
            assert not reports and metadata["n"] in (2, 3), (limit, reports)
            seen.add((path.name, metadata["n"]))
            assert_none_is_half_deleted(folder, tmp_path / "all")
            for step in (4, 5, 6):
                checkpoints.save(step, small(step), {"n": step})
        assert_last_are_kept(folder, keep)
        if stopping.calls <= limit:
            break
    assert seen == {("step-00000002", 2), ("step-00000002.old", 2), ("step-00000002", 3)}
    assert metadata == {"n": 3} and limit > 8


@pytest.mark.fast
def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^keep=-1 must be"):
        Checkpoints(tmp_path, keep=-1)
    with Checkpoints(tmp_path) as c:
        with pytest.raises(ValueError, match=r"^step=-1 must be"):
            c.save(-1, {}, {})
        with pytest.raises(ValueError, match=r"^about: JSON cannot hold it"):
            c.save(1, {}, {"x": object()})
        assert c.newest() is None
    with pytest.raises(ValueError, match=r"^path='.*' is no checkpoint"):
        read_metadata(tmp_path)


# ---- killed


def numbered(n):
    return {"x": torch.full((500_000,), float(n)), "y": torch.full((500_000,), -float(n)), "n": n}


def save_forever(folder):
    with Checkpoints(folder, keep=2) as c:
        _, about = c.newest()
        for n in range(about["n"] + 1, 10**6):
            c.save(n // 2, numbered(n), {"n": n})  # each step twice: replaced, too


def kill_again_and_again(folder, times):
    """Prints, for each time, what was left, and what the newest holds."""
    torch.set_num_threads(1)
    with Checkpoints(folder) as c:
        c.save(0, numbered(1), {"n": 1})
    for _ in range(times):
        child = os.fork()
        if child == 0:
            save_forever(folder)
        end = time.monotonic() + 10  # to begin writing
        while (
            not any(name.endswith(".partial") for name in names(folder)) and time.monotonic() < end
        ):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = []
        with Checkpoints(folder, report=said.append) as c:
            path, about = c.newest()
            state = numbered(0)
            c.load(path, state)
            assert_equal(state, numbered(about["n"]))
            print(json.dumps({"there": names(folder), "n": about["n"], "said": said}), flush=True)


def test_killed_at_any_moment_there_is_a_whole_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path), "10"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test'}"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 10 and not any(r["said"] for r in rounds), done.stdout
    saved = [r["n"] for r in rounds]
    assert saved == sorted(saved) and saved[-1] > saved[0]  # nothing that was complete is lost
    assert any(
        name.endswith(".partial") for r in rounds for name in r["there"]
    )  # some were hit while they wrote


if __name__ == "__main__":
    kill_again_and_again(sys.argv[1], int(sys.argv[2]))
