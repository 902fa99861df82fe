"""What a training step costs each rank: found by running one, without GPU, memory or other ranks.

The step is that of the trainer: the same model, attention algorithm, tensor parallelism, FSDP2 or
DDP, loss, backward and optimizer.  But its tensors have no memory (torch's FakeTensorMode), and its
collectives reach nobody (torch's "fake" backend), at the full number of ranks.  So all shapes,
lifetimes and collectives are those of the real run.  Left out is what no tensor of PyTorch holds:
buffers inside an operator or a backend (cuBLAS's, NCCL's), and what a GPU's allocator loses to
fragments.

Each layer makes the same call of the attention.  So attention runs in the first layer only, and its
bytes and its peak are added again for the others.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ringx.comm import collectives
from ringx.comm.collectives import Collective
from ringx.launch.mesh import Mesh, Shape
from ringx.measure.peak import Alive, Lifetimes

from .config import C, RunConfig
from .engine import Engine
from .flops import Flops

ENGINES = ("fsdp", "ddp")
# In torch.distributed, these take (output, input, ...); the others take the message first.
OUTPUT_BEFORE_INPUT = ("all_gather", "reduce_scatter", "all_to_all")

SentBytes = dict[str, dict[str, int]]  # {purpose: {collective: bytes that a rank sends}}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    peak = parameters + optimizer + gradients_at_peak + unsharded_at_peak + activations."""

    parameters: int  # as they are kept: this rank's shards
    gradients: int  # of these parameters, at the end of the backward
    optimizer: int  # state, from the first step on
    peak: int  # most that is alive at once in a step that is not the run's first
    gradients_at_peak: int  # those of `gradients` that exist at the peak
    unsharded_at_peak: int  # parameters that FSDP2 has gathered at the peak
    # All else at the peak: activations, attention's remote blocks and working memory, gradients
    # before they are summed.
    activations: int
    # What attention receives from other ranks: most at once, whether at the peak or not.
    remote_blocks: int


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
    tokens: int  # of a step, all ranks together
    passes: int  # forwards and backwards of a step
    flops_full: float  # of this rank; conventions: apps/common/flops.py
    flops_causal: float
    memory: MemoryEstimate
    sent: SentBytes  # as ringx.comm.collectives defines what a collective sends

    def table(self, memory_only: bool = False) -> str:
        """For people: lines of at most 100 columns."""
        lines = self._memory_lines()
        if not memory_only:
            lines += self._step_lines()
        return "\n".join(lines)

    def _memory_lines(self) -> list[str]:
        memory = self.memory
        gradients = _size(memory.gradients).strip()
        return [
            f"{self.name}: {self.parameters:,} parameters on {self.shape.world_size} ranks "
            f"({self.engine}); memory of rank {self.rank}:",
            f"  {_size(memory.peak)}  peak, of which:",
            f"    {_size(memory.parameters)}  parameters (this rank's shards)",
            f"    {_size(memory.optimizer)}  optimizer state",
            f"    {_size(memory.gradients_at_peak)}  gradients that exist at that moment; "
            f"of {gradients} in the end",
            f"    {_size(memory.unsharded_at_peak)}  gathered parameters",
            f"    {_size(memory.activations)}  activations and all else",
            f"  {_size(memory.remote_blocks)}  of other ranks' blocks in attention, "
            "at most at once",
            "Not seen: buffers inside operators and backends, fragments of the GPU's allocator.",
        ]

    def _step_lines(self) -> list[str]:
        flops = f"  {self.flops_full:.3e} FLOPs"
        if self.flops_causal != self.flops_full:
            flops += f" with attention in full, {self.flops_causal:.3e} with its causal half"
        total_sent = sum(sum(by_collective.values()) for by_collective in self.sent.values())
        lines = [
            f"a step: {self.samples:,} samples, {self.tokens:,} tokens, {self.passes} passes; "
            "of this rank:",
            flops,
            f"  {_size(total_sent)}  sent, of which:",
        ]
        for purpose, by_collective in self.sent.items():
            size = _size(sum(by_collective.values()))
            lines.append(f"    {size}  {purpose} ({', '.join(by_collective)})")
        return lines


@dataclass(frozen=True)
class StepSpec:
    """What an app's step consists of."""

    tokens: int  # of a sample
    layers: int
    parameters: int  # of the whole model
    flops: Flops  # per token
    build: Callable[[Mesh, Any], Engine]  # (mesh, allocating), as of Engine
    # (mesh, samples): what the model is called with, to return a sum of losses
    batch: Callable[[Mesh, int], list[torch.Tensor]]


def estimate_step(
    config: C, shape: Shape, specify: Callable[[C], StepSpec], rank: int = 0
) -> StepEstimate:
    """Runs a step of `config` on a mesh of `shape` as its `rank`, without memory and other ranks.

    Rank 0 has no less to hold and to compute than the others.  Attention is computed by the kernel
    for CPUs, which holds what the flash kernels for GPUs hold.  With `offload`, activations that
    would lie on the host are counted as if they stayed.

    Raises:
        ValueError: the configuration does not fit the mesh, or its engine is DeepSpeed's.
        RuntimeError: this process has a process group: one process can be one rank only."""
    if config.mesh.dp_engine not in ENGINES:
        raise ValueError(
            f"dp_engine={config.mesh.dp_engine}: memory and bytes of DeepSpeed's engines cannot be "
            f"estimated; take {' or '.join(ENGINES)}, or measure a step."
        )
    config.expect_fits(shape)
    if not 0 <= rank < shape.world_size:
        raise ValueError(f"rank={rank} must be one of the {shape.world_size} ranks.")
    config = config.changed({"kernel": "auto"})
    spec = specify(config)
    samples, _, passes = config.plan_batch(shape)
    tokens = samples * spec.tokens
    with _alone(shape.world_size, rank):
        memory, sent = _run_step(config, Mesh.make(shape), spec)
    return StepEstimate(
        name=config.name,
        shape=shape,
        engine=config.mesh.dp_engine,
        rank=rank,
        layers=spec.layers,
        parameters=spec.parameters,
        samples=samples,
        tokens=tokens,
        passes=passes,
        flops_full=spec.flops.full * tokens / shape.world_size,
        flops_causal=spec.flops.causal * tokens / shape.world_size,
        memory=memory,
        sent=sent,
    )


def _run_step(config: RunConfig, mesh: Mesh, spec: StepSpec) -> tuple[MemoryEstimate, SentBytes]:
    recorder = _StepRecorder(mesh)
    # Real meta tensors are let in: before its parameters are allocated, the model is on the meta
    # device.
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextlib.contextmanager
    def recording() -> Iterator[None]:
        with fake, recorder, _attend_once(recorder):
            yield

    engine = spec.build(mesh, recording())
    _, micro_batch, passes = config.plan_batch(mesh.shape)
    with recording():
        if isinstance(engine.model, torch.nn.parallel.DistributedDataParallel):
            engine.model.register_comm_hook(mesh.data, _sum_bucket)
        batch = spec.batch(mesh, micro_batch)
        _first_step(config, engine, batch)
        recorder.begin()
        loss = _forward_and_backward(engine, batch, spec.tokens, passes, recorder)
        gradients = _gradient_storages(engine, recorder)
        recorder.stage = "gradient norm"
        engine.step(config.train.lr, config.train.clip)
        recorder.stage = "loss"
        engine.sum(loss.detach())
    return _memory(engine, recorder, gradients), recorder.sent_bytes()


def _first_step(config: RunConfig, engine: Engine, batch: list[torch.Tensor]) -> None:
    """What only a run's first step does.

    It makes the optimizer's state, and DTensor tries out each operator."""
    if engine.mesh.shape.tp > 1:
        engine.backward(engine(*batch))
    else:
        for p in engine.module.parameters():
            p.grad = torch.zeros_like(p)
    engine.step(config.train.lr, config.train.clip)


def _forward_and_backward(
    engine: Engine, batch: list[torch.Tensor], tokens: int, passes: int, recorder: "_StepRecorder"
) -> torch.Tensor:
    """All passes of a step; returns the loss of the last one.

    At most two passes run: one counts for all but the last, and the last sums the gradients."""
    simulated = min(passes, 2)
    for i in range(simulated):
        is_last = i == simulated - 1
        with engine.accumulate(last=is_last):
            loss = engine(*batch) / tokens
            engine.backward(loss)
        if not is_last:
            recorder.multiply_sent(passes - 1)
    return loss


def _gradient_storages(engine: Engine, recorder: "_StepRecorder") -> set[Alive]:
    """The storages of this rank's gradients.

    A function of its own, so that no local variable keeps the gradients alive in what follows."""
    local_gradients = _local(p.grad for p in engine.module.parameters())
    return {recorder.account(gradient.untyped_storage(), new=False) for gradient in local_gradients}


def _memory(engine: Engine, recorder: "_StepRecorder", gradients: set[Alive]) -> MemoryEstimate:
    """The parts of the peak."""
    state: list[torch.Tensor] = []
    for parameter_state in engine.optimizer.state.values():
        state += [value for value in parameter_state.values() if isinstance(value, torch.Tensor)]
    parameters = _bytes(engine.module.parameters())
    optimizer = _bytes(state)
    at_peak = recorder.at_peak
    serials = {gradient.serial for gradient in gradients}
    gradients_at_peak = sum(at_peak.get(serial, 0) for serial in serials)
    gathered = (recorder.resized | recorder.gathered) - serials
    unsharded_at_peak = sum(at_peak.get(serial, 0) for serial in gathered)
    named = parameters + optimizer + gradients_at_peak + unsharded_at_peak
    return MemoryEstimate(
        parameters=parameters,
        gradients=sum(gradient.bytes for gradient in gradients),
        optimizer=optimizer,
        peak=recorder.peak,
        gradients_at_peak=gradients_at_peak,
        unsharded_at_peak=unsharded_at_peak,
        activations=recorder.peak - named,
        remote_blocks=recorder.remote_peak,
    )


@contextlib.contextmanager
def _alone(world_size: int, rank: int) -> Iterator[None]:
    """A default process group of `world_size` ranks, of which only this one exists."""
    if dist.is_initialized():
        raise RuntimeError(
            "estimate_step: this process is a rank of a process group already; call it in a "
            "process of its own."
        )
    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sum_bucket(group: ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums a bucket of gradients as DDP does.

    DDP's own way fails with the fake backend, whose futures hold nothing."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


# ---- what is seen at the dispatcher


class _StepRecorder(Lifetimes):
    """Lifetimes of storages, bytes that messages send, and which storages receive messages."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._tp_group = None
        if mesh.device_mesh is not None:
            self._tp_group = mesh.device_mesh["tp"].get_group().group_name
        self.calls: dict[tuple, _AttentionCall] = {}
        self.stage = ""  # what messages are for; "": their operator and group tell
        self.begin()

    def begin(self) -> None:
        """Forgets all that was recorded, except what is alive."""
        self.peak = self.now
        self.at_peak = {alive.serial: alive.bytes for alive in self.alive.values()}
        self.sent: dict[str, Counter[str]] = {}
        self.gathered: set[int] = set()  # serials of what FSDP2 gathers parameters into
        self._remote: dict[int, int] = {}  # serials of what attention receives into, by address
        self.remote_peak = 0

    def multiply_sent(self, factor: int) -> None:
        """Counts what has been sent so far `factor` times."""
        for by_collective in self.sent.values():
            for name in by_collective:
                by_collective[name] *= factor

    def sent_bytes(self) -> SentBytes:
        """Whole bytes by purpose and collective, of the purposes for which something is sent."""
        sent: SentBytes = {}
        for purpose, by_collective in self.sent.items():
            if sum(by_collective.values()):
                sent[purpose] = {name: round(size) for name, size in by_collective.items()}
        return sent

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # the tensor itself: of a fake one, the operator would make another
        out = super().see(func, args, kwargs)
        if func.namespace in ("c10d", "_c10d_functional"):
            operator = func._schema.name.split("::")[1]
            self._see_message(operator, func.namespace == "c10d", args)
        return out

    def _see_message(self, operator: str, in_place: bool, args: tuple) -> None:
        """Records an operator that sends or receives.

        in_place: it is one of c10d's, which write into tensors that they are given."""
        collective = collectives.of_operator(operator)
        if collective is None:
            raise NotImplementedError(f"the collective {operator} is not known here.")
        group = _group(args)
        if not _is_receive(operator):
            output_first = in_place and collective.name in OUTPUT_BEFORE_INPUT
            message = args[1] if output_first else args[0]
            self._count(collective, group, _sent_bytes(collective, group, message, args))
        if not in_place:
            return
        if self.stage.startswith("attention"):
            if _receives(collective, operator, group, args):
                self._see_received(_tensors(args[0]))
        elif collective.name == "all_gather":
            self._see_gathered(_tensors(args[0]))

    def _count(self, collective: Collective, group: ProcessGroup, sent: float) -> None:
        purpose = self.stage
        if not purpose and group.group_name == self._tp_group:
            purpose = "tensor parallel"
        if not purpose:
            purpose = "parameters" if collective.name == "all_gather" else "gradients"
        self.sent.setdefault(purpose, Counter())[collective.name] += sent  # type: ignore[assignment]

    def _see_gathered(self, tensors: list[torch.Tensor]) -> None:
        """Remembers what FSDP2 gathers parameters into."""
        for tensor in tensors:
            self.gathered.add(self.account(tensor.untyped_storage(), new=False).serial)

    def _see_received(self, tensors: list[torch.Tensor]) -> None:
        """Adds up how much memory received blocks take now."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._remote[storage._cdata] = self.account(storage, new=False).serial
        received = 0
        for address, serial in self._remote.items():
            alive = self.alive.get(address)
            if alive is not None and alive.serial == serial:
                received += alive.bytes
        self.remote_peak = max(self.remote_peak, received)


def _is_receive(operator: str) -> bool:
    """Whether it is the receiving half of a message from rank to rank, which sends nothing."""
    return operator.startswith("recv")


def _receives(collective: Collective, operator: str, group: ProcessGroup, args: tuple) -> bool:
    """Whether an in-place operator writes blocks of other ranks, as they are, into args[0]."""
    if collective.name == "broadcast":
        root = args[2]
        return root != group.rank()
    if collective.name == "send_recv":
        return _is_receive(operator)
    return collective.name in ("all_gather", "all_to_all")


def _group(args: tuple) -> ProcessGroup:
    """The group of a collective: c10d's operators box it, functional ones name it."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):  # a box of something else
                return ProcessGroup.unbox(arg)
    name = next(arg for arg in reversed(args) if isinstance(arg, str))
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _sent_bytes(collective: Collective, group: ProcessGroup, message: Any, args: tuple) -> float:
    """Bytes that this rank sends; exact for an all-to-all of unequal parts."""
    size = _bytes(_tensors(message))
    if collective.name == "all_to_all":
        parts = _parts(message, args)
        if sum(parts):
            return size - size * parts[group.rank()] / sum(parts)
    return collective.sent_bytes(size, group.size())


def _parts(message: Any, args: tuple) -> list[int]:
    """What an all-to-all sends to each rank, in any unit; empty: equally much."""
    if not isinstance(message, torch.Tensor):
        return [_bytes([part]) for part in message]
    splits = [arg for arg in args if isinstance(arg, (list, tuple)) and arg]
    return list(splits[-1]) if splits else []  # the last ones are those of the input


# ---- attention: run once


class _AttentionCall(NamedTuple):
    """One call of an attention pattern, to be repeated without running it."""

    peak: int  # bytes above what was there before it
    remote: int  # most bytes that it held of other ranks at once
    sent: Counter[str]
    outputs: list["_Output"]


class _Output(NamedTuple):
    """A result of such a call."""

    storage: int  # address: results may share one
    elements: int  # of the storage
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype


@contextlib.contextmanager
def _attend_once(recorder: _StepRecorder) -> Iterator[None]:
    """Inside, each pattern of ringx runs at the first of its equal calls only."""
    attention = importlib.import_module("ringx.api")
    pattern = attention.pattern
    calls = recorder.calls

    def run(name: str, direction: str, *args: Any) -> tuple[torch.Tensor, ...]:
        *tensors, plan = args
        key = (direction, plan, *[(x.shape, x.stride(), x.dtype) for x in tensors])
        outer_stage = recorder.stage
        recorder.stage = f"attention {direction}"
        try:
            if key in calls:
                return _repeat_call(recorder, calls[key])
            calls[key], out = _first_call(recorder, getattr(pattern(name), direction), args)
            return out
        finally:
            recorder.stage = outer_stage

    def replacement(name: str) -> SimpleNamespace:
        def forward(*args: Any) -> tuple[torch.Tensor, ...]:
            return run(name, "forward", *args)

        def backward(*args: Any) -> tuple[torch.Tensor, ...]:
            return run(name, "backward", *args)

        return SimpleNamespace(forward=forward, backward=backward)

    attention.pattern = replacement  # type: ignore[attr-defined]
    try:
        yield
    finally:
        attention.pattern = pattern  # type: ignore[attr-defined]


def _first_call(
    recorder: _StepRecorder, call: Callable, args: tuple
) -> tuple[_AttentionCall, tuple[torch.Tensor, ...]]:
    """Runs a call and records what it costs by itself."""
    peak_before = recorder.peak
    at_peak_before = recorder.at_peak
    sent_before = Counter(recorder.sent.get(recorder.stage, {}))
    remote_before = recorder.remote_peak
    start = recorder.now
    recorder.remote_peak = 0
    recorder.peak = start
    out = tuple(call(*args))
    peak = recorder.peak - start
    if peak_before >= recorder.peak:
        recorder.peak = peak_before
        recorder.at_peak = at_peak_before
    sent_after: Counter[str] = recorder.sent.get(recorder.stage, Counter())
    sent = Counter({name: size - sent_before[name] for name, size in sent_after.items()})
    remote = recorder.remote_peak
    recorder.remote_peak = max(remote, remote_before)
    outputs = [_output(tensor) for tensor in out]
    return _AttentionCall(peak=peak, remote=remote, sent=sent, outputs=outputs), out


def _repeat_call(recorder: _StepRecorder, call: _AttentionCall) -> tuple[torch.Tensor, ...]:
    """Adds what a call costs, and returns results such as it had."""
    sent = recorder.sent.setdefault(recorder.stage, Counter())
    for name, size in call.sent.items():
        sent[name] += size
    recorder.remote_peak = max(recorder.remote_peak, call.remote)
    if recorder.now + call.peak > recorder.peak:
        recorder.peak = recorder.now + call.peak
        recorder.at_peak = {alive.serial: alive.bytes for alive in recorder.alive.values()}
    storages: dict[int, torch.Tensor] = {}
    for output in call.outputs:
        if output.storage not in storages:
            storages[output.storage] = torch.empty(output.elements, dtype=output.dtype)
    return tuple(
        storages[output.storage].as_strided(output.size, output.stride, output.offset)
        for output in call.outputs
    )


def _output(tensor: torch.Tensor) -> _Output:
    storage = tensor.untyped_storage()
    return _Output(
        storage=storage._cdata,
        elements=storage.nbytes() // tensor.itemsize,
        size=tensor.shape,
        stride=tensor.stride(),
        offset=tensor.storage_offset(),
        dtype=tensor.dtype,
    )


# ---- bytes


def _tensors(nested: Any) -> list[torch.Tensor]:
    """The tensors of a tensor, or of lists of tensors or of such lists."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for part in nested for tensor in _tensors(part)]


def _local(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """What this rank holds of them; None is left out."""
    present = [x for x in tensors if x is not None]
    return [x.to_local() if isinstance(x, DTensor) else x for x in present]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in _local(tensors))


def _size(size: float) -> str:
    """Bytes in 10 columns."""
    for unit in ("B  ", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g}".rjust(6) + f" {unit}"
        size = size / 1024
    return f"{size:.3g}".rjust(6) + " GiB" if size < 1000 else f"{size:6.0f} GiB"
