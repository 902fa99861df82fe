"""What a training step costs each rank, found by running one: without GPU, without memory, without the other ranks.

The step is that of the trainer: the same model, the same attention algorithm, tensor parallelism, FSDP2 or DDP, loss, backward
and optimizer.  But its tensors have no memory (torch's FakeTensorMode), and its collectives reach nobody (torch's "fake" backend),
at the full number of ranks.  So all shapes, lifetimes and collectives are those of the real run, and what is left out is what no
tensor of PyTorch holds: buffers inside an operator or a backend (cuBLAS's, NCCL's), and what a GPU's allocator loses to fragments.

Each layer makes the same call of the attention: it runs in the first one, and its bytes and peak are added again for the others.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ringx.launch.mesh import Mesh, Shape
from ringx.measure.peak import Lifetimes

from .config import C, RunConfig
from .engine import Engine
from .flops import Flops

ENGINES = ("fsdp", "ddp")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.  peak = parameters + optimizer + gradients_at_peak + unsharded_at_peak + activations."""

    parameters: int  # as they are kept: this rank's shards
    gradients: int  # of these parameters, at the end of the backward
    optimizer: int  # state, from the first step on
    peak: int  # most that is alive at once in a step that is not the run's first
    gradients_at_peak: int  # those of `gradients` that exist then
    unsharded_at_peak: int  # parameters that FSDP2 has gathered
    activations: int  # all else: activations, attention's remote blocks and working memory, gradients before they are summed
    remote_blocks: int  # what attention's collectives receive from other ranks: most at once, at the peak or not


@dataclass(frozen=True)
class StepEstimate:
    """One training step, as one rank does it.  ``dataclasses.asdict`` of it is JSON."""

    name: str  # of the configuration
    shape: Shape
    engine: str
    rank: int
    layers: int
    parameters: int  # numbers of the whole model
    samples: int  # of a step, all ranks together
    tokens: int
    passes: int  # forwards and backwards of a step
    flops_full: float  # of this rank; conventions: apps/common/flops.py
    flops_causal: float
    memory: MemoryEstimate
    sent: dict[
        str, dict[str, int]
    ]  # {purpose: {collective: bytes}}, as ringx.comm defines what a collective sends

    def table(self, memory_only: bool = False) -> str:
        """For people: lines of at most 100 columns."""
        s, m = self.shape, self.memory
        lines = [
            f"{self.name}: {self.parameters:,} parameters on {s.world_size} ranks ({self.engine}); memory of rank {self.rank}:",
            f"  {_size(m.peak)}  peak, of which:",
            f"    {_size(m.parameters)}  parameters (this rank's shards)",
            f"    {_size(m.optimizer)}  optimizer state",
            f"    {_size(m.gradients_at_peak)}  gradients that exist at that moment; of {_size(m.gradients).strip()} in the end",
            f"    {_size(m.unsharded_at_peak)}  gathered parameters",
            f"    {_size(m.activations)}  activations and all else",
            f"  {_size(m.remote_blocks)}  of other ranks' blocks in attention, at most at once",
            "Not seen: buffers inside operators and backends, fragments of the GPU's allocator.",
        ]
        if memory_only:
            return "\n".join(lines)
        rows = [
            (sum(kinds.values()), purpose, ", ".join(kinds)) for purpose, kinds in self.sent.items()
        ]
        lines += [
            f"a step: {self.samples:,} samples, {self.tokens:,} tokens, {self.passes} passes; of this rank:",
            f"  {self.flops_full:.3e} FLOPs"
            + (
                f" with attention in full, {self.flops_causal:.3e} with its causal half"
                if self.flops_causal != self.flops_full
                else ""
            ),
            f"  {_size(sum(r[0] for r in rows))}  sent, of which:",
            *(f"    {_size(size)}  {purpose} ({kinds})" for size, purpose, kinds in rows),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class StepSpec:
    """What a plan is made of, as an app says it."""

    tokens: int  # of a sample
    layers: int
    parameters: int  # of the whole model
    flops: Flops  # per token
    build: Callable[[Mesh, Any], Engine]  # (mesh, allocating), as of Engine
    batch: Callable[
        [Mesh, int], list[torch.Tensor]
    ]  # (mesh, samples): what the model is called with, to return a sum of losses


def estimate_step(
    config: C, shape: Shape, subject: Callable[[C], StepSpec], rank: int = 0
) -> StepEstimate:
    """Runs a step of `config` on a mesh of that shape as its `rank`, without memory and without the others.

    Rank 0 has no less to hold and to compute than the others.  Attention is computed by the kernel for CPUs, which holds what the
    flash kernels for GPUs hold.  With `offload`, activations that would lie on the host are counted as if they stayed.

    Raises:
        ValueError: the configuration does not fit the mesh, or its engine is DeepSpeed's.
        RuntimeError: this process has a process group: one process can be one rank only."""
    if config.mesh.dp_engine not in ENGINES:
        raise ValueError(
            f"dp_engine={config.mesh.dp_engine}: memory and bytes of DeepSpeed's engines cannot be estimated; "
            f"take {' or '.join(ENGINES)}, or measure a step."
        )
    config.expect_fits(shape)
    if not 0 <= rank < shape.world_size:
        raise ValueError(f"rank={rank} must be one of the {shape.world_size} ranks.")
    config = config.changed({"kernel": "auto"})
    about = subject(config)
    samples, _, passes = config.plan_batch(shape)
    tokens = samples * about.tokens
    with _alone(shape.world_size, rank):
        mesh = Mesh.make(shape)
        memory, sent = _run(config, mesh, about)
    return StepEstimate(
        name=config.name,
        shape=shape,
        engine=config.mesh.dp_engine,
        rank=rank,
        layers=about.layers,
        parameters=about.parameters,
        samples=samples,
        tokens=tokens,
        passes=passes,
        flops_full=about.flops.full * tokens / shape.world_size,
        flops_causal=about.flops.causal * tokens / shape.world_size,
        memory=memory,
        sent=sent,
    )


def _run(
    config: RunConfig, mesh: Mesh, about: StepSpec
) -> tuple[MemoryEstimate, dict[str, dict[str, int]]]:
    watch, c = _Watch(mesh), config.train
    # Real meta tensors are let in: before its parameters are allocated, the model is on the meta device
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with fake, watch, _attend_once(watch):
            yield

    engine = about.build(mesh, watched())
    _, micro, passes = config.plan_batch(mesh.shape)
    seen = min(passes, 2)  # the last one, in which gradients are summed, and one of the others
    with watched():
        if isinstance(engine.model, torch.nn.parallel.DistributedDataParallel):
            engine.model.register_comm_hook(mesh.data, _sum)
        params = list(engine.module.parameters())
        batch = about.batch(mesh, micro)

        # First what only a run's first step does: it makes the optimizer's state, and DTensor tries out each operator
        if mesh.shape.tp > 1:
            engine.backward(engine(*batch))
        else:
            for p in params:
                p.grad = torch.zeros_like(p)
        engine.step(c.lr, c.clip)
        watch.begin()
        for i in range(seen):
            with engine.accumulate(last=i == seen - 1):
                loss = engine(*batch) / about.tokens
                engine.backward(loss)
            if i < seen - 1:
                watch.sent = {
                    purpose: _times(sent, passes - 1) for purpose, sent in watch.sent.items()
                }
        gradients = {
            watch.meet(x.untyped_storage(), new=False) for x in _local(p.grad for p in params)
        }
        watch.stage = "gradient norm"
        engine.step(c.lr, c.clip)
        watch.stage = "loss"
        engine.sum(loss.detach())

    state = [
        x
        for s in engine.optimizer.state.values()
        for x in s.values()
        if isinstance(x, torch.Tensor)
    ]
    kept, optimizer = _bytes(params), _bytes(state)
    at_peak = {g.serial: watch.at_peak.get(g.serial, 0) for g in gradients}
    unsharded = sum(
        watch.at_peak.get(serial, 0) for serial in (watch.resized | watch.gathered) - set(at_peak)
    )
    there = kept + optimizer + sum(at_peak.values()) + unsharded
    return MemoryEstimate(
        parameters=kept,
        gradients=sum(g.bytes for g in gradients),
        optimizer=optimizer,
        peak=watch.peak,
        gradients_at_peak=sum(at_peak.values()),
        unsharded_at_peak=unsharded,
        activations=watch.peak - there,
        remote_blocks=watch.remote_peak,
    ), {
        purpose: {kind: round(n) for kind, n in sent.items()}
        for purpose, sent in watch.sent.items()
        if sum(sent.values())
    }


@contextlib.contextmanager
def _alone(world: int, rank: int) -> Iterator[None]:
    """A default process group of `world` ranks, of which there is only this one."""
    if dist.is_initialized():
        raise RuntimeError(
            "estimate_step: this process is a rank of a process group already; call it in a process of its own."
        )
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sum(group: ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a bucket of gradients; its own way trips over the fake backend, whose futures hold nothing."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# ---- what is seen at the dispatcher


class _Watch(Lifetimes):
    """Lifetimes of storages, bytes that collectives send, and which storages these receive into."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._tp = (
            mesh.device_mesh["tp"].get_group().group_name if mesh.device_mesh is not None else None
        )
        self.calls: dict[tuple, _Call] = {}
        self.stage = ""  # what collectives are for; "": to be seen from the collective
        self.begin()

    def begin(self) -> None:
        """Of what has been seen, only what is alive is remembered."""
        self.peak, self.at_peak = self.now, {a.serial: a.bytes for a in self.alive.values()}
        self.sent: dict[str, Counter] = {}
        self.gathered: set[int] = set()  # serials of what FSDP2 gathers parameters into
        self._remote: dict[int, int] = {}  # serials of what attention receives into, by address
        self.remote_peak = 0

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it really is; of a fake tensor it would make another
        out = super().see(func, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(func._schema.name.split("::")[1], func.namespace == "c10d", args)
        return out

    def _collective(self, name: str, in_place: bool, args: tuple) -> None:
        kind = next(
            (kind for kind in _KINDS if kind.replace("_", "") in name.replace("_", "")), None
        )
        if kind is None:
            raise NotImplementedError(f"the collective {name} is not known here.")
        group = _group(args)
        parts = kind in ("all_gather", "reduce_scatter", "all_to_all")  # c10d's take output, input
        self._count(kind, group, _sends(kind, group, args[1 if parts and in_place else 0], args))
        if self.stage.startswith("attention"):
            if in_place and (
                kind in ("all_gather", "all_to_all")
                or (kind == "broadcast" and args[2] != group.rank())
            ):
                self._received(args[0])
        elif in_place and kind == "all_gather":
            self.gathered.update(
                self.meet(x.untyped_storage(), new=False).serial for x in _tensors(args[0])
            )

    def _count(self, kind: str, group: ProcessGroup, sent: float) -> None:
        purpose = self.stage
        if not purpose and group.group_name == self._tp:
            purpose = "tensor parallel"
        if not purpose:
            purpose = "parameters" if kind == "all_gather" else "gradients"
        self.sent.setdefault(purpose, Counter())[kind] += sent  # type: ignore[assignment]

    def _received(self, into: Any) -> None:
        for x in _tensors(into):
            self._remote[x.untyped_storage()._cdata] = self.meet(
                x.untyped_storage(), new=False
            ).serial
        alive = [
            a
            for key, serial in self._remote.items()
            if (a := self.alive.get(key)) and a.serial == serial
        ]
        self.remote_peak = max(self.remote_peak, sum(a.bytes for a in alive))


class _Call(NamedTuple):
    """One call of an attention algorithm, to be repeated without its inside."""

    peak: int  # bytes above what was there before it
    remote: int  # most bytes that it has received from other ranks at once
    sent: Counter
    outputs: list[tuple]  # of each: key and elements of its storage; size, strides, offset, dtype


@contextlib.contextmanager
def _attend_once(watch: _Watch) -> Iterator[None]:
    """ringx's algorithms, run at the first call of each kind."""
    attention = importlib.import_module("ringx.api")
    pattern, calls = attention.pattern, watch.calls

    def run(name: str, direction: str, *args: Any) -> tuple[torch.Tensor, ...]:
        *tensors, plan = args
        key = (direction, plan, *((x.shape, x.stride(), x.dtype) for x in tensors))
        outer, watch.stage = watch.stage, f"attention {direction}"
        try:
            if key in calls:
                return _repeat(watch, calls[key])
            calls[key], out = _first(watch, getattr(pattern(name), direction), args)
            return out
        finally:
            watch.stage = outer

    def stand_in(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            **{d: lambda *args, d=d: run(name, d, *args) for d in ("forward", "backward")}
        )

    attention.pattern = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        attention.pattern = pattern  # type: ignore[attr-defined]


def _first(watch: _Watch, call: Callable, args: tuple) -> tuple[_Call, tuple[torch.Tensor, ...]]:
    before, sent = (watch.peak, watch.at_peak), Counter(watch.sent.get(watch.stage, {}))
    remote_before, watch.remote_peak = watch.remote_peak, 0
    start = watch.peak = watch.now
    out = tuple(call(*args))
    peak = watch.peak - start
    if before[0] >= watch.peak:
        watch.peak, watch.at_peak = before
    now_sent = Counter(
        {kind: n - sent[kind] for kind, n in watch.sent.get(watch.stage, {}).items()}
    )
    outputs = [
        (
            x.untyped_storage()._cdata,
            x.untyped_storage().nbytes() // x.itemsize,
            x.shape,
            x.stride(),
            x.storage_offset(),
            x.dtype,
        )
        for x in out
    ]
    remote = watch.remote_peak
    watch.remote_peak = max(remote, remote_before)
    return _Call(peak, remote, now_sent, outputs), out


def _repeat(watch: _Watch, call: _Call) -> tuple[torch.Tensor, ...]:
    sent = watch.sent.setdefault(watch.stage, Counter())
    for kind, n in call.sent.items():
        sent[kind] += n
    watch.remote_peak = max(watch.remote_peak, call.remote)
    if watch.now + call.peak > watch.peak:
        watch.peak = watch.now + call.peak
        watch.at_peak = {a.serial: a.bytes for a in watch.alive.values()}
    storages: dict[int, torch.Tensor] = {}
    for key, elements, *_, dtype in call.outputs:
        if key not in storages:
            storages[key] = torch.empty(elements, dtype=dtype)
    return tuple(
        storages[key].as_strided(size, stride, offset)
        for key, _, size, stride, offset, _ in call.outputs
    )


_KINDS = (
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "all_reduce",
    "broadcast",
    "reduce",
)  # "reduce" is a part of others


def _group(args: tuple) -> ProcessGroup:
    """That of a collective: c10d's operators have it in a box, functional ones by name."""
    for x in args:
        if isinstance(x, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):  # a box of something else
                return ProcessGroup.unbox(x)
    return dist.distributed_c10d._resolve_process_group(
        next(x for x in reversed(args) if isinstance(x, str))
    )  # type: ignore[arg-type]


def _sends(kind: str, group: ProcessGroup, message: Any, args: tuple) -> float:
    """Bytes, as ringx.comm defines them."""
    n, size = group.size(), _bytes(_tensors(message))
    if kind == "all_gather":
        return size * (n - 1)
    if kind == "all_reduce":
        return 2 * size * (n - 1) / n
    if kind == "all_to_all" and (
        splits := next((x for x in reversed(args) if isinstance(x, (list, tuple)) and x), None)
    ):
        return size - size * splits[group.rank()] / sum(
            splits
        )  # the last list is what goes to each rank
    return size * (n - 1) / n


def _tensors(x: Any) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in _tensors(part)]


def _local(xs: Any) -> list[torch.Tensor]:
    return [x.to_local() if isinstance(x, DTensor) else x for x in xs if x is not None]


def _bytes(xs: Any) -> int:
    return sum(x.numel() * x.itemsize for x in _local(xs))


def _times(sent: Counter, n: int) -> Counter:
    return Counter({kind: size * n for kind, size in sent.items()})


def _size(n: int) -> str:
    """8 columns."""
    for unit in ("B  ", "KiB", "MiB", "GiB"):
        if n < 1000 or unit == "GiB":
            return f"{n:.3g}".rjust(6) + f" {unit}" if n < 1000 else f"{n:6.0f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    raise AssertionError
